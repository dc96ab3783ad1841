"""Loops of low-rank products, compiled by Numba; the rules of `arrays/kernels.py` apply.

The order of sums in BLAS depends on the CPU. These loops add in a fixed order, without fused
operations, so that ranks with different CPUs get the same bits.

A factor of rank r is float32[r, n]: one row for each column of the mathematical factor.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ef_horovod.arrays.kernels import _mix

_LANES = 64  # independent sums; a power of two and a compile-time constant, or LLVM is slow
_ROWS = 64  # rows per float32 partial sum, which is then added to the factor
_STRIP = 1024  # columns at once: their part of a factor fits the cache
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LOST = 1e-6  # a row that keeps less than this share of its length depends on earlier rows


@njit(cache=True, nogil=True)
def row_factor(x, basis, out):  # type: ignore[no-untyped-def]
    """out = (x basis^T)^T for x float32[a, b], basis float32[r, b], out float32[r, a]."""
    lanes = np.empty(_LANES, np.float32)
    for i in range(x.shape[0]):
        for j in range(basis.shape[0]):
            out[j, i] = _dot(x[i], basis[j], lanes)


@njit(cache=True, nogil=True)
def column_factor(x, basis, out):  # type: ignore[no-untyped-def]
    """out = basis x for x float32[a, b], basis float32[r, a], out float32[r, b] of zeros."""
    sums = np.empty((basis.shape[0], min(_STRIP, x.shape[1])), np.float32)
    for start in range(0, x.shape[1], _STRIP):
        stop = min(start + _STRIP, x.shape[1])
        for first in range(0, x.shape[0], _ROWS):
            sums[:] = 0
            for i in range(first, min(first + _ROWS, x.shape[0])):
                _add_outer(sums, basis[:, i], x[i, start:stop])
            for j in range(basis.shape[0]):
                for k in range(stop - start):
                    out[j, start + k] += sums[j, k]


@njit(cache=True, nogil=True)
def add_product(x, left, right, weight):  # type: ignore[no-untyped-def]
    """x += weight * left^T right for x float32[a, b], left float32[r, a], right float32[r, b].

    Adds the r products one after the other; each product is rounded, then each sum.
    """
    for start in range(0, x.shape[1], _STRIP):
        stop = min(start + _STRIP, x.shape[1])
        for i in range(x.shape[0]):
            row = x[i, start:stop]
            for j in range(left.shape[0]):
                factor = weight * left[j, i]
                other = right[j, start:stop]
                for k in range(row.size):
                    row[k] += factor * other[k]


@njit(cache=True, nogil=True)
def orthonormalise(basis, seed):  # type: ignore[no-untyped-def]
    """Make the rows of float32[r, n], r <= n, orthonormal by Gram-Schmidt, one after the other.

    A row that is not finite, or depends on earlier rows up to rounding, is replaced by a random row
    from the seed. So the result always has r orthonormal rows, also for zeros.
    """
    own = np.empty(basis.shape[1])  # float64: squares of float32 neither overflow nor vanish
    lanes = np.empty(_LANES)
    for j in range(basis.shape[0]):
        own[:] = basis[j]
        draw = np.uint64(0)
        while True:
            before = _dot(own, own, lanes)
            for _ in range(2):  # twice, because of rounding errors
                for other in basis[:j]:
                    share = _dot(own, other, lanes)
                    for k in range(own.size):
                        own[k] -= share * other[k]
            after = _dot(own, own, lanes)
            if np.isfinite(before) and after > _LOST**2 * before:
                break
            draw += np.uint64(1)
            _fill_random(own, np.uint64(seed) + (draw << np.uint64(32)) + np.uint64(j))
        scale = 1 / np.sqrt(after)
        for k in range(own.size):
            basis[j, k] = own[k] * scale


@njit(cache=True, nogil=True)
def _fill_random(x, seed):  # type: ignore[no-untyped-def]
    """x = random numbers of 53 bits in [-1, 1), from the seed."""
    state = _mix(seed)
    for k in range(x.size):
        state += _GOLDEN
        x[k] = np.float64(_mix(state) >> np.uint64(11)) * 2.0**-52 - 1.0


@njit(cache=True, nogil=True)
def _dot(x, y, lanes):  # type: ignore[no-untyped-def]
    """Sum of x_i y_i in an order that depends on the length only, in the precision of `lanes`."""
    lanes[:] = 0
    whole = x.size - x.size % _LANES
    for start in range(0, whole, _LANES):
        for k in range(_LANES):
            lanes[k] += x[start + k] * y[start + k]
    for k in range(x.size - whole):
        lanes[k] += x[whole + k] * y[whole + k]
    width = _LANES
    while width > 1:
        width //= 2
        for k in range(width):
            lanes[k] += lanes[width + k]
    return lanes[0]


@njit(cache=True, nogil=True)
def _add_outer(sums, weights, row):  # type: ignore[no-untyped-def]
    """sums[j] += weights[j] * row for each j."""
    for j in range(weights.size):
        weight = weights[j]
        for k in range(row.size):
            sums[j, k] += weight * row[k]
