"""Means of messages in one pass over memory: sums are made block by block in the innermost cache.

As in kernels.py: imported at the first use, `nogil`, deterministic. Each number is made by the same
operations, in the same order, as by decoding one message after the other to a vector of zeros,
dividing that and adding another vector.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ef_horovod.arrays.kernels import add_signs

_BLOCK = 4096  # float32 sums: a third of the innermost cache


@njit(cache=True, nogil=True)
def mean_of_signs(bits, scales, divisor, plus, out):  # type: ignore[no-untyped-def]
    """out = sum_m (scales[m] where the bit is set, -scales[m] elsewhere) / divisor + plus.

    Args:
        bits: uint8[n, ceil(d / 8)].
        scales: float32[n].
        divisor: float32.
        plus: float32[d], or float32[0] for nothing.
        out: float32[d], apart from plus.
    """
    sums = np.empty(_BLOCK, np.float32)
    for start in range(0, out.size, _BLOCK):
        part = out[start : start + _BLOCK]
        block = sums[: part.size]
        block[:] = 0
        for m in range(scales.size):
            add_signs(block, bits[m, start // 8 : (start + part.size + 7) // 8], scales[m])
        _finish(block, divisor, plus[start : start + _BLOCK], part)


@njit(cache=True, nogil=True)
def mean_of_entries(indices, values, ends, divisor, plus, out):  # type: ignore[no-untyped-def]
    """out = sum of n sparse vectors / divisor + plus.

    Args:
        indices: int64[k] below d: those of the first vector, ascending, then the second's, and so
            on.
        values: float32[k].
        ends: int64[n]: where each vector's entries end.
        divisor, plus, out: as above.
    """
    sums, at = np.empty(_BLOCK, np.float32), np.zeros_like(ends)
    at[1:] = ends[:-1]
    for start in range(0, out.size, _BLOCK):
        part = out[start : start + _BLOCK]
        block = sums[: part.size]
        block[:] = 0
        for m in range(ends.size):
            i = at[m]
            while i < ends[m] and indices[i] < start + _BLOCK:
                block[indices[i] - start] += values[i]
                i += 1
            at[m] = i
        _finish(block, divisor, plus[start : start + _BLOCK], part)


@njit(cache=True, nogil=True, error_model="numpy")  # no loop that asks for zeros is vectorised
def _finish(sums, divisor, plus, out):  # type: ignore[no-untyped-def]
    """out = sums / divisor + plus, rounded twice."""
    if plus.size:
        for i in range(out.size):
            out[i] = sums[i] / divisor + plus[i]
    else:
        for i in range(out.size):
            out[i] = sums[i] / divisor
