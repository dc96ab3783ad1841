"""What device ops of torch are made with: the choice of a kernel, the way to the host and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import ef_horovod.arrays.numpy as host


def kernel(on_device: Callable[..., Any]) -> Callable[..., Any]:
    """`on_device` for tensors off the CPU, the NumPy function of the same name on views else."""
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
    return x.cpu().numpy()


def from_host(values: np.ndarray, device: Any = None) -> torch.Tensor:
    """A host array as a tensor on `device`, sharing memory on the CPU."""
    if not values.flags.writeable:  # received bytes; torch has no read-only tensors
        values = values.copy()
    return torch.from_numpy(values).to(device)
