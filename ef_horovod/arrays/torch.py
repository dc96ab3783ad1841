"""Array functions for torch tensors.

CPU tensors use the kernels of `arrays/numpy.py` on views that share memory, so bits are equal.
Tensors on other devices use torch's own ops there; only payloads are copied to the host. Indices of
entries found there stay there, as int64 tensors.
Each device op can be tested without a device: `top_k.on_device(cpu_tensor, k)`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import ef_horovod.arrays.numpy as host
from ef_horovod.arrays.numpy import Like
from ef_horovod.arrays.torch_device import add_product as _add_product
from ef_horovod.arrays.torch_device import beside as _beside
from ef_horovod.arrays.torch_device import from_host as from_host
from ef_horovod.arrays.torch_device import kernel as _kernel
from ef_horovod.arrays.torch_device import to_host as to_host
from ef_horovod.arrays.torch_indices import *  # noqa: F403 - the code of index sets
from ef_horovod.arrays.torch_matrices import *  # noqa: F403 - low rank
from ef_horovod.arrays.torch_quantize import *  # noqa: F403 - the quantizers' part

_WORK = 1 << 22  # entries handled at once where a device op needs temporaries


def like(x: torch.Tensor) -> Like:
    """Shape, dtype and device of x, without keeping x alive."""
    import ef_horovod.arrays.torch as xp

    return Like(xp, tuple(x.shape), x.dtype, x.device)


def is_float(x: torch.Tensor) -> bool:
    """Whether x holds floating-point numbers; only these can be compressed."""
    return x.is_floating_point()


def why_not_writable(x: torch.Tensor) -> str:
    """Why kernels cannot change x in place; empty if they can."""
    if x.requires_grad:
        return "requires a gradient"
    return "" if x.is_contiguous() else "is a view with gaps"


def is_float64(x: torch.Tensor) -> bool:
    """Whether x has more precision than the float32 of payloads."""
    return x.dtype == torch.float64


def detached(x: torch.Tensor) -> torch.Tensor:
    """x itself, outside of any automatic differentiation."""
    return x.detach()


def flat_float32(x: torch.Tensor, *, writable: bool = False) -> torch.Tensor:
    """x as contiguous float32[n]: a view where x already is one, else a copy."""
    return x.detach().to(torch.float32).contiguous().view(-1)


def shaped(flat: torch.Tensor, target: Like) -> torch.Tensor:
    """A flat float32[n] in the shape of `target`."""
    return flat.view(target.shape)


def restore(flat: torch.Tensor, target: Like) -> torch.Tensor:
    """A flat float32[n] in the shape, dtype and device of `target`."""
    return flat.view(target.shape).to(target.dtype)


def zeros(length: int, device: Any = None) -> torch.Tensor:
    """float32[length] of zeros."""
    return torch.zeros(length, dtype=torch.float32, device=device)


def host_view(x: torch.Tensor) -> np.ndarray | None:
    """x as a NumPy array that shares its memory; None if it is not on the host."""
    return x.numpy() if x.device.type == "cpu" else None


def address(x: torch.Tensor) -> int:
    """Start of x's memory: equal for a tensor and a view of all of it."""
    return x.data_ptr()


@_kernel
def fill(x: torch.Tensor, value: float) -> None:
    x.fill_(value)


@_kernel
def assign(x: torch.Tensor, y: torch.Tensor) -> None:
    x.copy_(y)


def read(x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """A copy of x[start:stop]."""
    return x[start:stop].clone()


def write(x: torch.Tensor, start: int, values: torch.Tensor) -> None:
    """x[start : start + n] = values, of n numbers in any shape and dtype."""
    x[start : start + values.numel()].copy_(values.reshape(-1))


@_kernel
def divide(x: torch.Tensor, divisor: float, out: torch.Tensor) -> None:
    _divide(x, divisor, out)


@_kernel
def divide_checked(x: torch.Tensor, divisor: float, out: torch.Tensor) -> bool:
    _divide(x, divisor, out)
    return bool(torch.isfinite(torch.stack(torch.aminmax(out))).all()) if out.numel() else True


@_kernel
def add(x: torch.Tensor, y: torch.Tensor, weight: float = 1.0) -> None:
    _add_product(x, y, weight)


@_kernel
def average(x: torch.Tensor, y: torch.Tensor, weight: float, out: torch.Tensor) -> None:
    torch.mul(x, 1.0 - weight, out=out)
    _add_product(out, y, weight)


@_kernel
def average_square(x: torch.Tensor, y: torch.Tensor, weight: float, out: torch.Tensor) -> None:
    torch.mul(x, 1.0 - weight, out=out)
    out.add_(y * y * weight)


@_kernel
def divide_by_root(
    x: torch.Tensor,
    squares: torch.Tensor,
    least: float,
    of_zero: float,
    eps: float,
    out: torch.Tensor,
) -> None:
    torch.div(x, _roots(squares, least, of_zero).add_(eps), out=out)


@_kernel
def multiply_by_root(
    x: torch.Tensor,
    squares: torch.Tensor,
    least: float,
    of_zero: float,
    eps: float,
    out: torch.Tensor,
) -> None:
    torch.mul(x, _roots(squares, least, of_zero).add_(eps), out=out)


@_kernel
def abs_sum(x: torch.Tensor) -> float:
    return float(x.abs().sum(dtype=torch.float64))


@_kernel
def abs_max(x: torch.Tensor) -> float:
    if not x.numel():
        return 0.0
    least, most = torch.aminmax(x)  # propagates NaN; x.abs() would allocate a vector
    return abs(float(torch.maximum(-least, most)))


@_kernel
def squared_norm(x: torch.Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


@_kernel
def top_k(x: torch.Tensor, k: int) -> tuple[torch.Tensor, np.ndarray]:
    k = min(k, x.numel())
    if k == 0:
        return x[:0].long(), np.empty(0, np.float32)
    # As integers, magnitudes sort like floats with infinity and NaN at the top, as on the host.
    order = x.view(torch.int32) & 0x7FFFFFFF
    threshold = torch.topk(order, k, sorted=False).values.min()
    reaching = order >= threshold
    if int(reaching.sum()) > k + _WORK:  # indices of all ties would take vectors of memory
        reaching = _without_last_ties(order, threshold, k)
    indices = torch.nonzero(reaching).view(-1)
    spare = indices.numel() - k
    if spare:  # drop the last of the entries equal to the threshold
        chosen = torch.ones_like(indices, dtype=torch.bool)
        chosen[torch.nonzero(order[indices] == threshold).view(-1)[-spare:]] = False
        indices = indices[chosen]
    return indices, to_host(x[indices])


def _without_last_ties(order: torch.Tensor, threshold: torch.Tensor, k: int) -> torch.Tensor:
    """bool[n]: the entries above the threshold and the first ones equal to it, k in total."""
    kept = order > threshold
    missing = k - int(kept.sum())
    for start in range(0, order.numel(), _WORK):
        tied = torch.nonzero(order[start : start + _WORK] == threshold).view(-1)[:missing]
        kept[start + tied] = True
        missing -= tied.numel()
        if not missing:
            break
    return kept


@_kernel
def at_least(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, np.ndarray]:
    indices = torch.nonzero(~(x.abs() < threshold)).view(-1)
    return indices, to_host(x[indices])


@_kernel
def take(x: torch.Tensor, indices: np.ndarray | torch.Tensor) -> np.ndarray:
    return to_host(x[_beside(x, indices)])


@_kernel
def scatter_add(
    x: torch.Tensor, indices: np.ndarray | torch.Tensor, values: np.ndarray, weight: float
) -> None:
    # The indices are distinct. `index_add_` is avoided: a GPU's atomic additions treat numbers
    # below 1e-38 as zero.
    places = _beside(x, indices)
    own = x[places]
    _add_product(own, from_host(values, x.device).to(x.dtype), weight)
    x[places] = own


@_kernel
def scatter_put(x: torch.Tensor, indices: np.ndarray | torch.Tensor, values: np.ndarray) -> None:
    x[_beside(x, indices)] = from_host(values, x.device)


@_kernel
def pack_signs(x: torch.Tensor, scale: float, *, subtract: bool) -> np.ndarray:
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=x.device)
    packed = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)
    for start in range(0, x.numel(), _WORK):
        part = x[start : start + _WORK]
        positive = part >= 0
        padded = torch.nn.functional.pad(positive, (0, -part.numel() % 8))
        octets = padded.view(-1, 8) * weights  # [n / 8, 8]
        packed[start // 8 : start // 8 + len(octets)] = octets.sum(1, dtype=torch.uint8)
        if subtract:
            part.sub_(torch.where(positive, scale, -scale).to(x.dtype))
    return to_host(packed)


@_kernel
def add_signs(x: torch.Tensor, bits: np.ndarray, scale: float) -> None:
    shifts = torch.arange(8, dtype=torch.uint8, device=x.device)
    packed = from_host(bits, x.device)
    for start in range(0, x.numel(), _WORK):
        part = x[start : start + _WORK]
        octets = packed[start // 8 : (start + part.numel() + 7) // 8]
        signs = ((octets.unsqueeze(1) >> shifts) & 1).view(-1)[: part.numel()]
        part.add_(torch.where(signs.bool(), scale, -scale).to(x.dtype))


@_kernel
def narrow(x: torch.Tensor, kind: str, shift: int, *, subtract: bool) -> np.ndarray:
    codes = torch.empty(x.numel(), dtype=torch.int16, device=x.device)
    for start in range(0, x.numel(), _WORK):
        part = x[start : start + _WORK]
        scaled = (part.double() * 2.0**shift).float()
        rounded = scaled.clamp(-host.LARGEST[kind], host.LARGEST[kind]).to(getattr(torch, kind))
        codes[start : start + _WORK] = rounded.view(torch.int16)
        if subtract:
            part.sub_((rounded.double() * 2.0**-shift).float())
    return to_host(codes).view(np.uint16)


@_kernel
def add_widened(x: torch.Tensor, codes: np.ndarray, kind: str, shift: int, weight: float) -> None:
    half = from_host(codes.view(np.int16), x.device).view(getattr(torch, kind))
    for start in range(0, x.numel(), _WORK):
        wide = (half[start : start + _WORK].double() * 2.0**-shift).float()
        _add_product(x[start : start + _WORK], wide, weight)


def _roots(squares: torch.Tensor, least: float, of_zero: float) -> torch.Tensor:
    return squares.sqrt().clamp_(min=least).masked_fill_(squares == 0, of_zero)


def _divide(x: torch.Tensor, divisor: float, out: torch.Tensor) -> None:
    # Divide by a tensor on the device: for a Python number, torch multiplies with the reciprocal
    # there, which rounds twice.
    torch.div(x, torch.full((), divisor, dtype=x.dtype, device=x.device), out=out)
