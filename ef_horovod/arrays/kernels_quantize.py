"""Loops of the quantizers: block sums, random rounding, packing of codes of any width.

The rules of `kernels.py` apply: single-threaded, deterministic, no fastmath. Vectors are processed
in chunks that fit the cache: random bits, then codes, then the packed stream.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ef_horovod.arrays.kernels import WIDE_LANES, _mix, largest, squares

_CHUNK = 5120  # entries: a multiple of 40, so that chunks start at whole bytes and base-3 groups
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WORD = np.uint64(0xFFFFFFFF)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_ONE = np.float32(1)
_UNIT = np.float32(2.0**-24)


@njit(cache=True, nogil=True)
def block_max(bits, block, out):  # type: ignore[no-untyped-def]
    """Largest magnitude of each block of float bits, as float bits; NaN ranks above infinity."""
    for b in range(out.size):
        out[b] = largest(bits[b * block : (b + 1) * block])


@njit(cache=True, nogil=True)
def block_squares(x, block, out):  # type: ignore[no-untyped-def]
    """Sum of squares of each block as float64, in a fixed order."""
    lanes = np.zeros(WIDE_LANES, np.float64)
    for b in range(out.size):
        out[b] = squares(x[b * block : (b + 1) * block], lanes)


@njit(cache=True, nogil=True)
def _halves(x, sums):  # type: ignore[no-untyped-def]
    high, low, number = sums
    high[:], low[:], number[:] = 0, 0, 0
    whole = x.size - x.size % WIDE_LANES
    for i in range(0, whole, WIDE_LANES):
        for j in range(WIDE_LANES):
            value = np.float64(x[i + j])
            high[j] += value if value >= 0 else 0.0
            low[j] += 0.0 if value >= 0 else value
            number[j] += 1.0 if value >= 0 else 0.0
    for i in range(whole, x.size):
        value = np.float64(x[i])
        high[0] += value if value >= 0 else 0.0
        low[0] += 0.0 if value >= 0 else value
        number[0] += 1.0 if value >= 0 else 0.0
    return high.sum(), low.sum(), number.sum()


@njit(cache=True, nogil=True)
def block_halves(x, block, out):  # type: ignore[no-untyped-def]
    """For each block: sum of the entries >= 0, sum of the others, number of entries >= 0.

    out is float64[3, blocks]; sums are in a fixed order.
    """
    lanes = np.zeros(WIDE_LANES, np.float64)
    sums = (lanes, lanes.copy(), lanes.copy())
    for b in range(out.shape[1]):
        out[0, b], out[1, b], out[2, b] = _halves(x[b * block : (b + 1) * block], sums)


@njit(cache=True, nogil=True)
def draw(seed, start, out):  # type: ignore[no-untyped-def]
    """Random bits for the entries from `start` on: uint64[m], half a word each; start is even.

    Word j of a vector is the splitmix64 finaliser of seed + (j + 1) * golden ratio.
    """
    first = np.uint64(seed) + np.uint64(start // 2 + 1) * _GOLDEN
    for j in range(out.size):
        out[j] = _mix(first + np.uint64(j) * _GOLDEN)


@njit(cache=True, nogil=True)
def _pack(codes, width, out):  # type: ignore[no-untyped-def]
    """Pack codes without gaps into uint32 words, lowest bit first."""
    word, filled, place = np.uint64(0), 0, 0
    for i in range(codes.size):
        word |= np.uint64(codes[i]) << np.uint64(filled)
        filled += width
        if filled >= 32:
            out[place] = np.uint32(word & _WORD)
            word >>= np.uint64(32)
            filled -= 32
            place += 1
    if filled > 0:
        out[place] = np.uint32(word & _WORD)


@njit(cache=True, nogil=True)
def _unpack(words, width, out):  # type: ignore[no-untyped-def]
    """The reverse of `_pack`; reads one word past that of the last code."""
    mask = (np.uint64(1) << np.uint64(width)) - np.uint64(1)
    for i in range(out.size):
        bit = i * width
        place = bit >> 5
        both = np.uint64(words[place]) | (np.uint64(words[place + 1]) << np.uint64(32))
        out[i] = np.uint32((both >> np.uint64(bit & 31)) & mask)


@njit(cache=True, nogil=True)
def _pack_ternary(codes, out):  # type: ignore[no-untyped-def]
    """Pack codes 0, 1 and 3 as digits 0, 1 and 2, five in a byte; code 2 becomes 0 too."""
    whole = codes.size // 5
    for i in range(whole):
        byte = np.uint32(0)
        for j in range(4, -1, -1):
            code = codes[5 * i + j]
            byte = 3 * byte + (code & 1) + (code & (code >> 1))
        out[i] = byte
    if whole < out.size:
        byte = np.uint32(0)
        for i in range(codes.size - 1, 5 * whole - 1, -1):
            byte = 3 * byte + (codes[i] & 1) + (codes[i] & (codes[i] >> 1))
        out[whole] = byte


@njit(cache=True, nogil=True)
def _unpack_ternary(packed, out):  # type: ignore[no-untyped-def]
    """The reverse of `_pack_ternary`."""
    whole = out.size // 5
    for i in range(whole):
        rest = np.uint32(packed[i])
        for j in range(5):
            digit = rest % 3
            rest //= 3
            out[5 * i + j] = digit | (digit >> 1)
    if whole < packed.size and 5 * whole < out.size:
        rest = np.uint32(packed[whole])
        for i in range(5 * whole, out.size):
            digit = rest % 3
            rest //= 3
            out[i] = digit | (digit >> 1)


@njit(cache=True, nogil=True)
def largest_code(words, width, n, mask):  # type: ignore[no-untyped-def]
    """The largest of n codes after `& mask`."""
    largest = np.uint32(0)
    codes = np.empty(_CHUNK, np.uint32)
    for start in range(0, n, _CHUNK):
        part = codes[: min(_CHUNK, n - start)]
        _unpack(words[start * width // 32 :], width, part)
        for i in range(part.size):
            largest = max(largest, part[i] & np.uint32(mask))
    return largest


@njit(cache=True, nogil=True)
def _round_uniform(x, random, scale, limit, sign_bit, out):  # type: ignore[no-untyped-def]
    """Codes of x / scale, rounded at random to a neighbouring integer, at most `limit`."""
    for i in range(x.size):
        place = min(abs(x[i]) / scale, limit)
        level = np.int32(place)
        rest = place - np.float32(level)
        level += np.int32(np.float32(np.int32(random[i] >> np.uint32(8))) * _UNIT < rest)
        out[i] = np.uint32(level) | (sign_bit if x[i] < 0 else np.uint32(0))


@njit(cache=True, nogil=True)
def _round_powers(x, random, scale, limit, sign_bit, place, bits, out):  # type: ignore[no-untyped-def]
    """Codes of x / scale, rounded at random to a neighbouring power of two, or 0 below 1."""
    for i in range(x.size):
        place[i] = min(abs(x[i]) / scale, limit)
    for i in range(x.size):
        small = np.float32(np.int32(random[i] >> np.uint32(8))) * _UNIT < place[i]
        large = np.int32((bits[i] + (random[i] >> np.uint32(9))) >> np.uint32(23)) - np.int32(126)
        level = np.int32(small) if place[i] < _ONE else large
        out[i] = np.uint32(level) | (sign_bit if x[i] < 0 else np.uint32(0))


@njit(cache=True, nogil=True)
def _levels(codes, powers, mask, out, bits):  # type: ignore[no-untyped-def]
    """The magnitudes of codes on the grid; `bits` is `out` as uint32."""
    if powers:
        for i in range(codes.size):
            level = codes[i] & mask
            bits[i] = (level + np.uint32(126)) << np.uint32(23) if level else np.uint32(0)
    else:
        for i in range(codes.size):
            out[i] = np.float32(np.int32(codes[i] & mask))


@njit(cache=True, nogil=True)
def _add_levels(x, codes, levels, scale, weight, sign_bit):  # type: ignore[no-untyped-def]
    for i in range(x.size):
        value = weight * (scale * levels[i])
        x[i] += -value if codes[i] & sign_bit else value


@njit(cache=True, nogil=True)
def _add_codes(x, start, codes, scales, block, powers, weight, sign_bit, room):  # type: ignore[no-untyped-def]
    """x += weight * (its block's scale * level); x is a vector's part from `start` on."""
    levels = room[: x.size]
    _levels(codes, powers, sign_bit - np.uint32(1), levels, levels.view(np.uint32))
    done = 0
    while done < x.size:
        b = (start + done) // block
        stop = min((b + 1) * block - start, x.size)
        _add_levels(x[done:stop], codes[done:stop], levels[done:stop], scales[b], weight, sign_bit)
        done = stop


@njit(cache=True, nogil=True)
def _round(x, start, random, scales, limits, block, powers, sign_bit, room, codes):  # type: ignore[no-untyped-def]
    """Codes of a vector's part from `start` on, with one scale per block."""
    bits = room.view(np.uint32)
    done = 0
    while done < x.size:
        b = (start + done) // block
        stop = min((b + 1) * block - start, x.size)
        scale = scales[b] if limits[b] > 0 else _ONE
        part, dice, own = x[done:stop], random[done:stop], codes[done:stop]
        if powers:
            places = room[done:stop]
            _round_powers(part, dice, scale, limits[b], sign_bit, places, bits[done:stop], own)
        else:
            _round_uniform(part, dice, scale, limits[b], sign_bit, own)
        done = stop


@njit(cache=True, nogil=True)
def quantize(x, scales, limits, block, powers, width, seed, lost, share, out):  # type: ignore[no-untyped-def]
    """Round x / scale at random to integers, or to powers of two; width 0 packs in base 3.

    out is uint32 words, or uint8 for base 3. `lost` is empty, or x, which becomes
    x - share * (rounded x).
    """
    random64, codes = np.empty(_CHUNK // 2, np.uint64), np.empty(_CHUNK, np.uint32)
    random, room = random64.view(np.uint32), np.empty(_CHUNK, np.float32)
    sign_bit = np.uint32(1 << (width - 1)) if width else np.uint32(2)
    for start in range(0, x.size, _CHUNK):
        part = x[start : start + _CHUNK]
        own = codes[: part.size]
        draw(seed, start, random64[: (part.size + 1) // 2])
        _round(part, start, random, scales, limits, block, powers, sign_bit, room, own)
        if width:
            _pack(own, width, out[start * width // 32 :])
        else:
            _pack_ternary(own, out[start // 5 : (start + part.size + 4) // 5])
        if lost.size:
            part = lost[start : start + _CHUNK]
            _add_codes(part, start, own, scales, block, powers, -share, sign_bit, room)


@njit(cache=True, nogil=True)
def add_quantized(x, packed, scales, block, powers, width, weight):  # type: ignore[no-untyped-def]
    """x += weight * the numbers that `quantize` coded."""
    codes, room = np.empty(_CHUNK, np.uint32), np.empty(_CHUNK, np.float32)
    sign_bit = np.uint32(1 << (width - 1)) if width else np.uint32(2)
    for start in range(0, x.size, _CHUNK):
        part = x[start : start + _CHUNK]
        own = codes[: part.size]
        if width:
            _unpack(packed[start * width // 32 :], width, own)
        else:
            _unpack_ternary(packed[start // 5 : (start + part.size + 4) // 5], own)
        _add_codes(part, start, own, scales, block, powers, weight, sign_bit, room)


@njit(cache=True, nogil=True)
def shorten(x, width, factor, seed, dither, lost, share, words):  # type: ignore[no-untyped-def]
    """The upper `width` bits of x * factor, with random bits added to the lower ones if `dither`.

    `lost` is empty, or x, which becomes x - share * (rounded x); factor is a power of two.
    """
    random64 = np.zeros(_CHUNK // 2, np.uint64)
    random, codes = random64.view(np.uint32), np.empty(_CHUNK, np.uint32)
    scaled = np.empty(_CHUNK, np.float32)
    bits = scaled.view(np.uint32)
    drop = np.uint32(32 - width)
    most = (np.uint32(0x7F800000) >> drop) - np.uint32(1)  # code of the largest finite number
    for start in range(0, x.size, _CHUNK):
        part = x[start : start + _CHUNK]
        if dither:
            draw(seed, start, random64[: (part.size + 1) // 2])
        for i in range(part.size):
            scaled[i] = part[i] * factor
        for i in range(part.size):
            low = random[i] >> np.uint32(width) if dither else np.uint32(0)
            code = min(((bits[i] & _MAGNITUDE) + low) >> drop, most)
            codes[i] = code | ((bits[i] >> np.uint32(31)) << np.uint32(width - 1))
        _pack(codes[: part.size], width, words[start * width // 32 :])
        if lost.size:
            own = lost[start : start + _CHUNK]
            for i in range(own.size):
                bits[i] = codes[i] << drop
            for i in range(own.size):
                own[i] -= share * (scaled[i] * (_ONE / factor))


@njit(cache=True, nogil=True)
def add_shortened(x, words, width, factor, weight):  # type: ignore[no-untyped-def]
    """x += weight * the numbers that `shorten` coded."""
    codes, scaled = np.empty(_CHUNK, np.uint32), np.empty(_CHUNK, np.float32)
    bits = scaled.view(np.uint32)
    for start in range(0, x.size, _CHUNK):
        part = x[start : start + _CHUNK]
        _unpack(words[start * width // 32 :], width, codes[: part.size])
        for i in range(part.size):
            bits[i] = codes[i] << np.uint32(32 - width)
        for i in range(part.size):
            part[i] += weight * (scaled[i] * (_ONE / factor))


@njit(cache=True, nogil=True)
def _add_sides_bytes(x, bits, above, below):  # type: ignore[no-untyped-def]
    """x += above where the bit is set, below elsewhere; x starts at a whole byte of bits."""
    whole = x.size // 8
    for i in range(whole):
        byte = bits[i]
        for j in range(8):
            x[8 * i + j] += above if (byte >> j) & 1 else below
    for i in range(8 * whole, x.size):
        x[i] += above if (bits[whole] >> (i - 8 * whole)) & 1 else below


@njit(cache=True, nogil=True)
def add_sides(x, bits, high, low, block, weight):  # type: ignore[no-untyped-def]
    """x += weight * (high of the entry's block where its bit is set, low elsewhere)."""
    for b in range((x.size + block - 1) // block):
        above, below = weight * high[b], weight * low[b]
        start, stop = b * block, min((b + 1) * block, x.size)
        if start % 8 == 0:
            _add_sides_bytes(x[start:stop], bits[start // 8 :], above, below)
        else:
            for i in range(start, stop):
                x[i] += above if (bits[i >> 3] >> np.uint8(i & 7)) & np.uint8(1) else below
