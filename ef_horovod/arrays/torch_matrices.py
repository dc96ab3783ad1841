"""Low-rank products for torch; `arrays/torch.py` re-exports them.

Off the CPU, factors are summed in the device's own order. Products of factors are computed entry by
entry and are bitwise those of the host, because all ranks must get the same aggregated gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ef_horovod.arrays.matrices import Matrix, each_factor
from ef_horovod.arrays.numpy_matrices import __all__ as __all__
from ef_horovod.arrays.torch_device import from_host, kernel, to_host

_WORK = 1 << 22  # entries handled at once where a device op needs temporaries


@kernel
def factors(
    x: torch.Tensor, matrices: Sequence[Matrix], bases: np.ndarray, *, left: bool
) -> np.ndarray:
    given = each_factor(matrices, from_host(bases, x.device), left=not left)
    made = [x[:0]]
    for matrix, basis in given:
        whole = _view(x, matrix)
        made.append((basis @ (whole.T if left else whole)).view(-1))
    return to_host(torch.cat(made))


@kernel
def add_products(
    x: torch.Tensor,
    matrices: Sequence[Matrix],
    lefts: np.ndarray,
    rights: np.ndarray,
    weight: float,
) -> None:
    own = each_factor(matrices, from_host(lefts, x.device), left=True)
    other = each_factor(matrices, from_host(rights, x.device), left=False)
    for (matrix, left), (_, right) in zip(own, other, strict=True):
        step = max(1, _WORK // matrix.columns)
        for part, share in zip(_view(x, matrix).split(step), left.split(step, 1), strict=True):
            for j in range(matrix.rank):
                part.add_((share[j] * weight).unsqueeze(1) * right[j])


def _view(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    return x[matrix.start : matrix.stop].view(matrix.rows, matrix.columns)
