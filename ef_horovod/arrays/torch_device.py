"""Helpers of torch device ops: choice of a kernel, copies to and from the host, packed codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import ef_horovod.arrays.numpy as host
from ef_horovod.arrays.grid import bits_nbytes

_WORK = 1 << 22  # entries handled at once where a product needs memory


def kernel(on_device: Callable[..., Any]) -> Callable[..., Any]:
    """`on_device` for tensors off the CPU, otherwise the NumPy function of that name on views."""
    on_host = getattr(host, on_device.__name__)

    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.device.type != "cpu":
            return on_device(x, *args, **kwargs)
        views = [a.numpy() if isinstance(a, torch.Tensor) else a for a in args]
        outs = {n: a.numpy() if isinstance(a, torch.Tensor) else a for n, a in kwargs.items()}
        return on_host(x.numpy(), *views, **outs)

    run.__name__ = on_device.__name__
    run.__doc__ = on_host.__doc__
    run.on_device = on_device  # type: ignore[attr-defined]
    return run


def to_host(x: torch.Tensor) -> np.ndarray:
    """x as a NumPy array, sharing memory on the CPU."""
    if x.device.type != "cuda":
        return x.cpu().numpy()
    staged = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    staged.copy_(x)
    return staged.numpy()


def from_host(values: np.ndarray, device: Any = None) -> torch.Tensor:
    """A host array as a tensor on `device`, sharing memory on the CPU."""
    if torch.device(device or "cpu").type == "cuda":
        # GPUs access page-locked memory directly, and torch keeps it for the next copy. New memory
        # would cost a page fault per page.
        dtype = torch.from_numpy(np.empty(0, values.dtype)).dtype
        staged = torch.empty(values.shape, dtype=dtype, pin_memory=True)
        np.copyto(staged.numpy(), values)
        return staged.to(device, non_blocking=True)
    if not values.flags.writeable:  # received bytes; torch has no read-only tensors
        values = values.copy()
    return torch.from_numpy(values).to(device)


def beside(x: torch.Tensor, indices: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Indices of x, of the host or of x's device, on x's device."""
    return indices if isinstance(indices, torch.Tensor) else from_host(indices, x.device)


def add_product(x: torch.Tensor, y: torch.Tensor, weight: float) -> None:
    """x += weight * y, rounded twice as on the host; a GPU's `add_` with a factor rounds once."""
    exact = abs(math.frexp(weight)[0]) == 0.5  # a power of two: the product is not rounded
    if exact or not x.numel():
        x.add_(y, alpha=weight)
        return
    for part, other in zip(x.split(_WORK), y.split(_WORK), strict=True):
        part.add_(other * weight)


def pack_codes(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Codes packed without gaps, lowest bit first: eight codes take `width` bytes."""
    groups = torch.nn.functional.pad(codes, (0, -codes.numel() % 8)).view(-1, 8)
    columns = []
    for j in range(width):
        byte = torch.zeros_like(groups[:, 0])
        for k in range(8 * j // width, (8 * j + 7) // width + 1):
            shift = k * width - 8 * j
            byte |= groups[:, k] << shift if shift >= 0 else groups[:, k] >> -shift
        columns.append((byte & 255).to(torch.uint8))
    return torch.stack(columns, 1).view(-1)[: bits_nbytes(codes.numel(), width)]


def unpack_codes(packed: torch.Tensor, width: int, n: int) -> torch.Tensor:
    """int64[n]: the reverse of `pack_codes`."""
    filled = torch.nn.functional.pad(packed, (0, -packed.numel() % width))
    groups = filled.view(-1, width).long()
    columns = []
    for k in range(8):
        code = torch.zeros_like(groups[:, 0])
        for j in range(k * width // 8, (k * width + width - 1) // 8 + 1):
            shift = 8 * j - k * width
            code |= groups[:, j] << shift if shift >= 0 else groups[:, j] >> -shift
        columns.append(code & ((1 << width) - 1))
    return torch.stack(columns, 1).view(-1)[:n]
