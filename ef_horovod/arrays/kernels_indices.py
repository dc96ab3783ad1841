"""Loops of the index codes, compiled by Numba; docs/wire-format.md describes the format.

As in kernels.py: imported at the first use, `nogil`, deterministic. Decoders read bytes from the
network, so no loop here reads or writes outside of its arrays, whatever the bytes are.
"""

from __future__ import annotations

import numpy as np
from numba import njit

PRECISION = 12  # the frequencies of a gap code add up to 2**PRECISION
_ALL = np.uint64(1 << PRECISION)
_SLOT = _ALL - np.uint64(1)
# Between symbols the coder's state is in [_START, _END); one word always brings it back.
_START, _END = np.uint64(1 << 31), np.uint64(1 << 63)
_LIMIT = np.uint64(63 - PRECISION)
_WORD, _WORD_MASK = np.uint64(32), np.uint64(0xFFFFFFFF)


@njit(cache=True, nogil=True)
def encode_gaps(indices, low_bits, escape_bits, symbols, low, high):  # type: ignore[no-untyped-def]
    """Write the gap code of int64[k] ascending indices into zeroed uint32 arrays.

    Args:
        indices: at least one.
        low_bits: number of a gap's lower bits, which go to `low`; its upper part is coded into
            `high`.
        escape_bits: an upper part below e = 2**escape_bits is a symbol. Symbol e is the escape,
            which adds e to the next symbol.
        symbols: uint64[e + 1, 4] with frequency, sum of the frequencies before it, and inverse and
            shift for `_quotient` to divide by the frequency.
        low: uint32[ceil(k * low_bits / 32)].
        high: uint32[at least 2].

    Returns:
        Whether the code fits into `high`; nothing is written beyond it.
    """
    escape = np.uint64(1) << np.uint64(escape_bits)
    state, place = _START, high.size
    for i in range(indices.size - 1, -1, -1):  # the decoder reads symbols in reverse order
        upper = np.uint64(_gap(indices, i)) >> np.uint64(low_bits)
        escapes, symbol = upper >> np.uint64(escape_bits), upper & (escape - np.uint64(1))
        while True:
            frequency = symbols[symbol, 0]
            if state >= frequency << _LIMIT:
                if place == 2:
                    return False
                place -= 1
                high[place] = state & _WORD_MASK
                state >>= _WORD
            quotient = _quotient(state, symbols[symbol, 2], symbols[symbol, 3])
            # (quotient << PRECISION) + remainder + start
            state += quotient * (_ALL - frequency) + symbols[symbol, 1]
            if escapes == 0:
                break
            escapes -= np.uint64(1)
            symbol = escape
    high[0], high[1] = state & _WORD_MASK, state >> _WORD
    _move_down(high, place)
    _pack_low(indices, low_bits, low)
    return True


@njit(cache=True, nogil=True)
def _quotient(x, inverse, shift):  # type: ignore[no-untyped-def]
    """x // f as x * inverse >> (64 + shift): twice as fast (Granlund and Montgomery 1994).

    Exact for x < 2**63 with 2**shift <= f <= 2**(shift + 1) and inverse = 2**(64 + shift) / f
    rounded up.
    """
    low = (x & _WORD_MASK) * (inverse & _WORD_MASK)
    middle = (x >> _WORD) * (inverse & _WORD_MASK) + (low >> _WORD)
    cross = (x & _WORD_MASK) * (inverse >> _WORD) + (middle & _WORD_MASK)
    return ((x >> _WORD) * (inverse >> _WORD) + (middle >> _WORD) + (cross >> _WORD)) >> shift


@njit(cache=True, nogil=True)
def _gap(indices, i):  # type: ignore[no-untyped-def]
    return indices[i] - indices[i - 1] - 1 if i else indices[0]


@njit(cache=True, nogil=True)
def _move_down(high, place):  # type: ignore[no-untyped-def]
    """Move the words from index `place` on to index 2, followed by zeros."""
    gone = place - 2
    for i in range(2, high.size):
        high[i] = high[i + gone] if i + gone < high.size else 0


@njit(cache=True, nogil=True)
def _pack_low(indices, low_bits, low):  # type: ignore[no-untyped-def]
    word, filled, place = np.uint64(0), 0, 0
    mask = (np.uint64(1) << np.uint64(low_bits)) - np.uint64(1)
    for i in range(indices.size):
        word |= (np.uint64(_gap(indices, i)) & mask) << np.uint64(filled)
        filled += low_bits
        if filled >= 32:
            low[place] = word & _WORD_MASK
            word >>= _WORD
            filled -= 32
            place += 1
    if filled:
        low[place] = word


@njit(cache=True, nogil=True)
def decode_gaps(low, high, low_bits, table, escape, bound, out):  # type: ignore[no-untyped-def]
    """Decode a gap code into ascending indices below bound.

    Args:
        low: uint32[ceil(out.size * low_bits / 32)].
        high: uint32[at least 2].
        low_bits: as in encode_gaps.
        table: uint32[2**PRECISION], indexed by the state's lower bits: frequency << 18 |
            distance from the symbol's first entry << 5 | symbol.
        escape: the symbol that adds itself to the next one.
        bound: exclusive bound of the indices, at most 2**31.
        out: int64[k].

    Returns:
        The number of valid indices. Fewer than out.size: the code is broken at that place. More:
        it does not end with the last index.
    """
    good = _decode_upper(high, table, escape, bound, out)
    if good != out.size:
        return good
    word, filled, place = np.uint64(0), 0, 0
    mask = (np.uint64(1) << np.uint64(low_bits)) - np.uint64(1)
    index = np.int64(-1)
    for i in range(out.size):
        if filled < low_bits:
            word |= np.uint64(low[place]) << np.uint64(filled)
            filled += 32
            place += 1
        index += 1 + (out[i] << low_bits | np.int64(word & mask))
        word >>= np.uint64(low_bits)
        filled -= low_bits
        if index >= bound:
            return i
        out[i] = index
    return out.size + 1 if word else out.size


@njit(cache=True, nogil=True)
def _decode_upper(high, table, escape, bound, out):  # type: ignore[no-untyped-def]
    """Decode upper parts, each at most bound + escape, into out; returns as decode_gaps."""
    state, place = np.uint64(high[0]) | np.uint64(high[1]) << _WORD, 2
    if not _START <= state < _END:
        return 0
    for i in range(out.size):
        upper = 0
        while True:
            entry = np.uint64(table[state & _SLOT])
            symbol = np.int64(entry & np.uint64(31))
            offset = entry >> np.uint64(5) & np.uint64(0x1FFF)
            state = (entry >> np.uint64(18)) * (state >> np.uint64(PRECISION)) + offset
            if state < _START:
                if place == high.size:
                    return i
                state = state << _WORD | np.uint64(high[place])
                place += 1
            upper += symbol
            if symbol != escape:
                break
            if upper > bound:  # so that shifting it cannot overflow
                return i
        out[i] = upper
    return out.size if state == _START and not np.any(high[place:]) else out.size + 1


@njit(cache=True, nogil=True)
def encode_elias_fano(indices, low_bits, low, high):  # type: ignore[no-untyped-def]
    """Elias-Fano code: packed low bits, high parts in unary; low and high must be zeroed."""
    word, filled, byte = np.uint64(0), 0, 0
    low_mask = (np.uint64(1) << np.uint64(low_bits)) - np.uint64(1)
    for i in range(indices.size):
        index = np.uint64(indices[i])
        position = (index >> np.uint64(low_bits)) + np.uint64(i)
        high[position >> np.uint64(3)] |= np.uint8(1) << np.uint8(position & np.uint64(7))
        word |= (index & low_mask) << np.uint64(filled)
        filled += low_bits
        while filled >= 8:
            low[byte] = np.uint8(word & np.uint64(0xFF))
            word >>= np.uint64(8)
            filled -= 8
            byte += 1
    if filled > 0:
        low[byte] = np.uint8(word)


@njit(cache=True, nogil=True)
def decode_elias_fano(low, high, low_bits, bound, out):  # type: ignore[no-untyped-def]
    """Decode into ascending indices below bound.

    Returns the number of valid indices. Fewer than out.size: the code is broken at that place.
    More: it has set bits that belong to no index.
    """
    word, filled, byte = np.uint64(0), 0, 0
    low_mask = (np.uint64(1) << np.uint64(low_bits)) - np.uint64(1)
    count, previous = 0, -1
    for place in range(high.size):
        unary = high[place]
        bit = 0
        while unary:
            while not unary & 1:
                unary >>= 1
                bit += 1
            if count == out.size:
                return count + 1
            while filled < low_bits:
                word |= np.uint64(low[byte]) << np.uint64(filled)
                filled += 8
                byte += 1
            high_part = 8 * place + bit - count
            index = (high_part << low_bits) | np.int64(word & low_mask)
            word >>= np.uint64(low_bits)
            filled -= low_bits
            if index <= previous or index >= bound:
                return count
            out[count] = index
            previous = index
            count += 1
            unary >>= 1
            bit += 1
    return count + 1 if count == out.size and word else count
