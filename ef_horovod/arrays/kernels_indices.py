"""Loops of the index code, compiled by Numba; docs/wire-format.md describes the format.

As in kernels.py: imported at the first use, `nogil`, deterministic. The decoder reads bytes from
the network, so it reads and writes inside its arrays, whatever the bytes are.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ef_horovod.arrays.kernels import DE_BRUIJN, PLACE

_WORD, _WORD_MASK = np.uint64(32), np.uint64(0xFFFFFFFF)


@njit(cache=True, nogil=True)
def encode(indices, bits, low, high):  # type: ignore[no-untyped-def]
    """Write the code of int64[k] ascending indices into zeroed arrays.

    Args:
        bits: number of low bits of an index, which go to `low` side by side; the rest sets one bit
            of `high`.
        low: uint32, of at least k * bits bits.
        high: uint8, of at least k + (the last index >> bits) bits.
    """
    word, filled, place = np.uint64(0), 0, 0
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for i in range(indices.size):
        index = np.uint64(indices[i])
        unary = (index >> np.uint64(bits)) + np.uint64(i)
        high[unary >> np.uint64(3)] |= np.uint8(1) << np.uint8(unary & np.uint64(7))
        word |= (index & mask) << np.uint64(filled)
        filled += bits
        if filled >= 32:
            low[place] = word & _WORD_MASK
            word >>= _WORD
            filled -= 32
            place += 1
    if filled:
        low[place] = word


@njit(cache=True, nogil=True)
def decode(low, high, bits, bound, out):  # type: ignore[no-untyped-def]
    """Decode ascending indices below bound into int64[k].

    Args:
        low: uint32, of at least k * bits bits and one more word.
        high: uint64.
        bits: as in `encode`.

    Returns:
        The number of good indices. Fewer than k: the code is broken at that place. More: bits that
        belong to no index are set in `high`.
    """
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    count, previous, at = 0, -1, 0
    for i in range(high.size):
        word = high[i]
        while word:
            if count == out.size:
                return count + 1
            lowest = word & (~word + np.uint64(1))
            unary = 64 * i + PLACE[(lowest * DE_BRUIJN) >> np.uint64(58)]
            two = np.uint64(low[at >> 5]) | np.uint64(low[(at >> 5) + 1]) << _WORD
            index = (unary - count) << bits | np.int64((two >> np.uint64(at & 31)) & mask)
            if index <= previous or index >= bound:
                return count
            out[count] = previous = index
            at += bits
            count += 1
            word ^= lowest
    return count
