"""Low-rank products for NumPy; `arrays/numpy.py` re-exports them.

As there, `x` is a flat, contiguous float32[n]; the matrices in it do not overlap. The factors of
all matrices are one concatenated array on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np

from ef_horovod.arrays.matrices import Matrix, each_factor, factors_size

__all__ = ["add_products", "factors"]


def factors(
    x: np.ndarray, matrices: Sequence[Matrix], bases: np.ndarray, *, left: bool
) -> np.ndarray:
    """The factor M B of each matrix M for a basis B (b x r) if `left`, else M^T B (B is a x r)."""
    out = np.zeros(factors_size(matrices, left=left), np.float32)
    kernel = _kernels().row_factor if left else _kernels().column_factor
    own = each_factor(matrices, out, left=left)
    given = each_factor(matrices, bases, left=not left)
    for (matrix, factor), (_, basis) in zip(own, given, strict=True):
        kernel(_view(x, matrix), basis, factor)
    return out


def add_products(
    x: np.ndarray,
    matrices: Sequence[Matrix],
    lefts: np.ndarray,
    rights: np.ndarray,
    weight: float,
) -> None:
    """M += weight * P Q^T for each matrix M and its factors P, Q."""
    # Entry by entry, so that all devices get the same bits.
    own = each_factor(matrices, lefts, left=True)
    other = each_factor(matrices, rights, left=False)
    for (matrix, left), (_, right) in zip(own, other, strict=True):
        _kernels().add_product(_view(x, matrix), left, right, np.float32(weight))


def _view(x: np.ndarray, matrix: Matrix) -> np.ndarray:
    return x[matrix.start : matrix.stop].reshape(matrix.rows, matrix.columns)


def _kernels() -> ModuleType:
    from ef_horovod.arrays import kernels_matrices

    return kernels_matrices
