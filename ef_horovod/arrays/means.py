"""Means of payloads on the host, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np


def mean_of_signs(
    bits: Sequence[np.ndarray],
    scales: Sequence[float],
    divisor: int,
    plus: np.ndarray | None,
    out: np.ndarray,
) -> None:
    """out = (sum of `add_signs`, one after the other) / divisor, + plus unless None."""
    _kernels().mean_of_signs(
        np.stack(bits), np.array(scales, np.float32), np.float32(divisor), _or_empty(plus), out
    )


def mean_of_entries(
    indices: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    divisor: int,
    plus: np.ndarray | None,
    out: np.ndarray,
) -> None:
    """out = (sum of `scatter_add`) / divisor, + plus unless None; all indices ascend."""
    ends = np.cumsum([each.size for each in indices])
    flat = np.concatenate(indices), np.concatenate(values)
    _kernels().mean_of_entries(*flat, ends, np.float32(divisor), _or_empty(plus), out)


def _or_empty(x: np.ndarray | None) -> np.ndarray:
    return np.empty(0, np.float32) if x is None else x


def _kernels() -> ModuleType:
    """The compiled kernels, imported at their first use."""
    from ef_horovod.arrays import kernels_means

    return kernels_means
