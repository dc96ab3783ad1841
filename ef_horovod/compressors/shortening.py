"""Shared code of `TruncateMantissa` and `Natural`, which send the upper bits of float32 numbers.

A float32 below 2**-126 has no implicit leading one, so it can lose all of its bits with the lower
ones. Therefore a vector whose entries are all below 2**-62 is first scaled by 2**87; then even the
smallest float32 has its leading one. In other vectors such entries do not matter: they are below
2**-64 of the largest.
"""

from __future__ import annotations

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.grid import bits_nbytes
from ef_horovod.arrays.numpy_quantize import largest_code
from ef_horovod.compressors.base import Compressor, require_finite
from ef_horovod.errors import PayloadError
from ef_horovod.wire import Fields

_SMALL = 2.0**-62
_SHIFT = 87  # brings the smallest float32, 2**-149, to 2**-62


def shorten(
    x: Array, width: int, seed: int | None, compressor: Compressor, *, residual: float
) -> tuple[np.ndarray, np.ndarray]:
    """(shift, codes) of `width` bits; see `shorten` of the array functions."""
    xp = namespace(x)
    largest = xp.abs_max(x)
    require_finite(largest, compressor)
    shift = _SHIFT if largest < _SMALL else 0
    codes = xp.shorten(x, width, shift, seed, subtract=residual)
    return np.array([shift], "<u4"), codes


def add_shortened(
    fields: Fields, shift: int, width: int, what: str, dense: Array, weight: float
) -> None:
    """dense += weight * (the unread numbers of the body), after checking all of them."""
    d = dense.shape[0]
    codes = fields.array("u1", bits_nbytes(d, width))
    fields.end()
    infinity, magnitude = 0x7F800000 >> (32 - width), (1 << (width - 1)) - 1
    if shift not in (0, _SHIFT) or largest_code(codes, width, d, magnitude) >= infinity:
        raise PayloadError(
            f"{what} payload has shift {shift} or a number that is not finite, expected 0 or "
            f"{_SHIFT} and finite numbers; it was damaged on the way"
        )
    namespace(dense).add_shortened(dense, codes, width, shift, weight)
