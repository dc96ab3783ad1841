"""Cloning: split workers with large smoothness constants, in the analysis or in the job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ef_horovod.theory.smoothness import Smoothness


class Cloning(NamedTuple):
    """The number of copies of each worker, and the resulting constants."""

    copies: np.ndarray  # int64[n], N_i = ceil(L_i / L_AM)
    total: int  # N = sum N_i, from n to 2 n
    scale: np.ndarray  # float64[n], a clone of worker i has the loss scale_i f_i, N / (n N_i)
    L_QM: float  # of the clones, at most sqrt(2) L_AM
    bound: float  # sqrt(2) L_AM


def clone(L_i: Sequence[float]) -> Cloning:
    """N_i = ceil(L_i / L_AM) clones of worker i, each with the loss (N / (n N_i)) f_i.

    The mean over the clones is f again. EF21 over the clones may use 1 / (L + L_QM xi) with their
    L_QM. The weights of EF21-W reach L_AM without clones.

    Args:
        L_i: smoothness constants of the n workers, finite and positive.

    Raises:
        ValueError: there are no constants, or one is out of range.

    Example:
        >>> import ef_horovod as ef
        >>> cloning = ef.theory.clone([1, 1, 1, 100])
        >>> cloning.copies.tolist(), round(cloning.L_QM, 2), round(cloning.bound, 2)
        ([1, 1, 1, 4], 33.09, 36.42)

    References:
        Richtarik, Gasanov, Burlachenko: Error Feedback Reloaded (ICLR 2024), for the factor
        sqrt(2), from its reviews; the formulas were derived again.
    """
    checked = Smoothness(max(L_i, default=1.0), L_i)  # L is unused; the largest L_i bounds it
    each, mean = np.array(checked.L_i), checked.L_AM
    # Slightly below the ratio: otherwise rounding of the mean could double all of equal L_i.
    copies = np.maximum(np.ceil(each / mean * (1 - 1e-12)), 1).astype(np.int64)
    total = int(copies.sum())
    scale = total / (each.size * copies)
    L_QM = float(np.sqrt(total * np.sum(each**2 / copies)) / each.size)
    return Cloning(copies, total, scale, L_QM, float(np.sqrt(2) * mean))
