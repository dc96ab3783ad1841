"""Means of payloads in one pass over memory, summed block by block in the innermost cache.

As in kernels.py: imported at the first use, `nogil`, deterministic. The result is bitwise that of
separate passes: decode one payload after the other into zeros, divide, add another vector.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ef_horovod.arrays.kernels import add_signs

_BLOCK = 4096  # float32 sums, a third of the innermost cache


@njit(cache=True, nogil=True)
def mean_of_signs(bits, scales, divisor, plus, out):  # type: ignore[no-untyped-def]
    """out = sum_m (scales[m] where the bit is set, -scales[m] elsewhere) / divisor + plus.

    Args:
        bits: uint8[n, ceil(d / 8)].
        scales: float32[n].
        divisor: float32.
        plus: float32[d], or float32[0] to add nothing.
        out: float32[d], not the memory of plus.
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
        indices: int64[k] below d, ascending within each vector, one vector after the other.
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


@njit(cache=True, nogil=True, error_model="numpy")  # a check for zero would stop vectorisation
def _finish(sums, divisor, plus, out):  # type: ignore[no-untyped-def]
    """out = sums / divisor + plus, rounded twice."""
    if plus.size:
        for i in range(out.size):
            out[i] = sums[i] / divisor + plus[i]
    else:
        for i in range(out.size):
            out[i] = sums[i] / divisor
