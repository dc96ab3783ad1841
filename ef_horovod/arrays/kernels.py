"""Loops over vectors, compiled by Numba.

Imported at the first use, because Numba takes longer to import than the rest of the package.
All kernels are `nogil`, single-threaded and deterministic: equal input bits give equal output bits
in every process and with every framework. Fastmath stays off for that reason.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_LANES = 32  # independent accumulators: lets LLVM vectorise a sum without reordering it
WIDE_LANES = 64  # the same for sums in float64: fewer are not vectorised
_BLOCK = 4096  # entries per float32 partial sum, which is then added in float64; fits the cache
# Times a word of eight bytes 0 or 1: their bits, packed into the uppermost byte.
_GATHER = np.uint64(0x0102040810204080)
_MAGNITUDES, _EXPONENT_ONES = np.uint64(0x7FFFFFFF7FFFFFFF), np.uint64(0x0080000000800000)
# Times a word with one set bit: the upper six bits identify which of the 64 bits is set.
DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
PLACE = np.argsort([(int(DE_BRUIJN) << place) % 2**64 >> 58 for place in range(64)])


@njit(cache=True, nogil=True)
def add(x, y, weight):  # type: ignore[no-untyped-def]
    """x += weight * y, both float32[n]."""
    for i in range(x.size):
        x[i] += weight * y[i]


@njit(cache=True, nogil=True)
def average_square(x, y, keep, weight, out):  # type: ignore[no-untyped-def]
    """out = keep * x + weight * y**2, all float32[n]."""
    for i in range(x.size):
        out[i] = keep * x[i] + y[i] * y[i] * weight


@njit(cache=True, nogil=True, error_model="numpy")
def divide_by_root(x, squares, least, of_zero, eps, out):  # type: ignore[no-untyped-def]
    """out = x / (max(sqrt(squares), least) + eps), all float32[n]; of_zero for sqrt(0)."""
    for i in range(x.size):
        root = of_zero if squares[i] == 0 else max(np.sqrt(squares[i]), least)
        out[i] = x[i] / (root + eps)


@njit(cache=True, nogil=True)
def multiply_by_root(x, squares, least, of_zero, eps, out):  # type: ignore[no-untyped-def]
    """out = x * (max(sqrt(squares), least) + eps), all float32[n]; of_zero for sqrt(0)."""
    for i in range(x.size):
        root = of_zero if squares[i] == 0 else max(np.sqrt(squares[i]), least)
        out[i] = x[i] * (root + eps)


@njit(cache=True, nogil=True)
def largest(bits):  # type: ignore[no-untyped-def]
    """Largest magnitude of uint32[n] float bits, as float bits; NaN ranks above infinity."""
    most = np.uint32(0)
    for i in range(bits.size):
        most = max(most, bits[i] & np.uint32(0x7FFFFFFF))
    return most


@njit(cache=True, nogil=True, error_model="numpy")  # division by zero does not raise
def divide(x, divisor, words):  # type: ignore[no-untyped-def]
    """x /= divisor; returns whether the entries in `words` became finite.

    Args:
        words: x as uint64, two entries each; for odd n it lacks the last entry.
    """
    found = np.uint64(0)
    for start in range(0, x.size, _BLOCK):  # the second loop reads from the cache
        part, pairs = x[start : start + _BLOCK], words[start // 2 : (start + _BLOCK) // 2]
        for i in range(part.size):
            part[i] = part[i] / divisor
        for i in range(pairs.size):  # the sum sets the sign bit for inf and NaN only
            found |= (pairs[i] & _MAGNITUDES) + _EXPONENT_ONES
    return found & ~_MAGNITUDES == 0


@njit(cache=True, nogil=True)
def abs_sum(x):  # type: ignore[no-untyped-def]
    """Sum of |x_i| as float64, in a fixed order; not finite if an x_i is not or all are huge."""
    total = 0.0
    lanes = np.zeros(_LANES, np.float32)
    blocks = x.size // _BLOCK
    rows = x[: blocks * _BLOCK].reshape(blocks, _BLOCK // _LANES, _LANES)
    for b in range(blocks):
        lanes[:] = 0
        for i in range(0, _BLOCK // _LANES, 4):  # four rows per load and store of the lanes
            for j in range(_LANES):
                two = (lanes[j] + abs(rows[b, i, j])) + abs(rows[b, i + 1, j])
                lanes[j] = (two + abs(rows[b, i + 2, j])) + abs(rows[b, i + 3, j])
        for j in range(_LANES):
            total += np.float64(lanes[j])
    lanes[:] = 0
    whole = x.size - x.size % _LANES
    for i in range(blocks * _BLOCK, whole, _LANES):
        for j in range(_LANES):
            lanes[j] += abs(x[i + j])
    for j in range(_LANES):
        total += np.float64(lanes[j])
    for i in range(whole, x.size):
        total += np.float64(abs(x[i]))
    return total


@njit(cache=True, nogil=True)
def abs_sum_wide(x):  # type: ignore[no-untyped-def]
    """`abs_sum` in float64 only: slower; not finite only if an x_i is not."""
    total = 0.0
    for i in range(x.size):
        total += np.float64(abs(x[i]))
    return total


@njit(cache=True, nogil=True)
def squared_norm(x):  # type: ignore[no-untyped-def]
    """Sum of x_i**2 as float64, in a fixed order."""
    return squares(x, np.empty(WIDE_LANES, np.float64))


@njit(cache=True, nogil=True)
def squares(x, lanes):  # type: ignore[no-untyped-def]
    """`squared_norm`, with float64[WIDE_LANES] to work in."""
    lanes[:] = 0
    whole = x.size - x.size % WIDE_LANES
    for i in range(0, whole, WIDE_LANES):
        for j in range(WIDE_LANES):
            value = np.float64(x[i + j])
            lanes[j] += value * value
    total = lanes.sum()
    for i in range(whole, x.size):
        total += np.float64(x[i]) * np.float64(x[i])
    return total


@njit(cache=True, nogil=True)
def collect_at_least(x, threshold, indices, values):  # type: ignore[no-untyped-def]
    """Collect the entries with |x_i| >= threshold or NaN, ascending, while the outputs have room.

    Args:
        x: float32[n].
        threshold: float32.
        indices: int64[m].
        values: float32[m].

    Returns:
        The number of such entries; more than m means that the outputs were too small.
    """
    flags, bits = np.zeros(_BLOCK, np.uint8), np.empty(_BLOCK // 8, np.uint8)
    words = bits.view(np.uint64)
    count = 0
    for start in range(0, x.size, _BLOCK):
        part = x[start : start + _BLOCK]
        for i in range(part.size):  # branch-free: each hit would be mispredicted
            flags[i] = not abs(part[i]) < threshold
        flags[part.size :] = 0
        _pack(flags, bits)
        for i in range(words.size):
            word = words[i]
            while word:
                lowest = word & (~word + np.uint64(1))
                place = 64 * i + PLACE[(lowest * DE_BRUIJN) >> np.uint64(58)]
                if count < indices.size:
                    indices[count] = start + place
                    values[count] = part[place]
                count += 1
                word ^= lowest
    return count


@njit(cache=True, nogil=True)
def _pack(flags, bits):  # type: ignore[no-untyped-def]
    """Bit j of bits[i] = flags[8i + j], for uint8[m] bits and uint8[8m] flags of 0 or 1."""
    octets = flags.view(np.uint64)
    for i in range(bits.size):
        bits[i] = (octets[i] * _GATHER) >> np.uint64(56)


@njit(cache=True, nogil=True)
def exponent_histogram(bits, counts):  # type: ignore[no-untyped-def]
    """Count uint32[n] float bits by exponent and top four mantissa bits, into int64[4096]."""
    # Two tables: neighbours often share a bin, and successive updates of one count would stall.
    odd = np.zeros_like(counts)
    shift, mask = np.uint32(19), np.uint32(0xFFF)
    pairs = bits.size - bits.size % 2
    for i in range(0, pairs, 2):
        counts[(bits[i] >> shift) & mask] += 1
        odd[(bits[i + 1] >> shift) & mask] += 1
    if pairs < bits.size:
        counts[(bits[pairs] >> shift) & mask] += 1
    counts += odd


@njit(cache=True, nogil=True)
def digit_histogram(bits, upper, shift, counts):  # type: ignore[no-untyped-def]
    """Count the magnitudes in uint32[n] float bits that begin with `upper`, by their next bits.

    Args:
        upper: the leading bits.
        shift: position of the next bits.
        counts: int64[2**width], where width is the number of next bits.
    """
    mask = np.uint32(counts.size - 1)
    down = np.uint32(shift)
    for i in range(bits.size):
        magnitude = (bits[i] & np.uint32(0x7FFFFFFF)) >> down
        counts[magnitude & mask] += magnitude // np.uint32(counts.size) == upper


@njit(cache=True, nogil=True)
def collect_largest(bits, threshold, ties, indices):  # type: ignore[no-untyped-def]
    """Ascending indices of magnitudes > threshold and the first `ties` equal to it: int64[k]."""
    count = 0
    for i in range(bits.size):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        tied = magnitude == threshold and ties > 0
        if tied or magnitude > threshold:
            indices[count] = i
            count += 1
            ties -= tied


@njit(cache=True, nogil=True)
def keep_largest(  # type: ignore[no-untyped-def]
    magnitudes, threshold, ties, indices, values, kept_indices, kept_values
):
    """Keep the entries with a magnitude > threshold, and the first `ties` equal to it.

    Args:
        magnitudes: of the values, of any type.
        indices, values: int64[n], float32[n].
        kept_indices, kept_values: int64[k + 1], float32[k + 1] for k entries to keep; the last
            item is scratch.
    """
    count = 0
    for i in range(magnitudes.size):  # branch-free: a branch would often be mispredicted
        kept_indices[count], kept_values[count] = indices[i], values[i]
        tied = (magnitudes[i] == threshold) & (ties > 0)
        ties -= tied
        count += (magnitudes[i] > threshold) | tied


@njit(cache=True, nogil=True)
def take(x, indices, out):  # type: ignore[no-untyped-def]
    """out = x[indices]."""
    for i in range(indices.size):
        out[i] = x[indices[i]]


@njit(cache=True, nogil=True)
def scatter_add(x, indices, values, weight):  # type: ignore[no-untyped-def]
    """x[indices] += weight * values."""
    for i in range(indices.size):
        x[indices[i]] += weight * values[i]


@njit(cache=True, nogil=True)
def scatter_put(x, indices, values):  # type: ignore[no-untyped-def]
    """x[indices] = values."""
    for i in range(indices.size):
        x[indices[i]] = values[i]


@njit(cache=True, nogil=True)
def pack_signs(x, out):  # type: ignore[no-untyped-def]
    """Bit j of out[i] is x[8i + j] >= 0."""
    flags = np.zeros(_BLOCK, np.uint8)
    for start in range(0, x.size, _BLOCK):
        part = x[start : start + _BLOCK]
        for i in range(part.size):
            flags[i] = part[i] >= 0
        flags[part.size :] = 0
        _pack(flags, out[start // 8 : (start + _BLOCK) // 8])


@njit(cache=True, nogil=True)
def add_signs(x, bits, scale):  # type: ignore[no-untyped-def]
    """x += scale where the bit is set, x -= scale elsewhere."""
    whole = x.size // 8
    for i in range(whole):
        byte = bits[i]
        for j in range(8):
            x[8 * i + j] += scale if (byte >> j) & 1 else -scale
    for i in range(8 * whole, x.size):
        x[i] += scale if (bits[whole] >> (i - 8 * whole)) & 1 else -scale


@njit(cache=True, nogil=True)
def split_signs(x, scale, out):  # type: ignore[no-untyped-def]
    """`pack_signs`; also x -= scale where the bit is set, x += scale elsewhere, in one pass."""
    flags = np.zeros(_BLOCK, np.uint8)
    for start in range(0, x.size, _BLOCK):
        part = x[start : start + _BLOCK]
        for i in range(part.size):
            positive = part[i] >= 0
            flags[i] = positive
            part[i] -= scale if positive else -scale
        flags[part.size :] = 0
        _pack(flags, out[start // 8 : (start + _BLOCK) // 8])


@njit(cache=True, nogil=True)
def random_indices(state, bound, out):  # type: ignore[no-untyped-def]
    """out = different indices below bound: the first images of a keyed permutation.

    A balanced Feistel network of six rounds permutes the numbers below a power of four. An image at
    or above the bound is permuted again until it falls below (Black and Rogaway 2002).
    """
    half = np.uint64(1)
    while np.uint64(1) << (half + half) < np.uint64(bound):
        half += np.uint64(1)
    mask = (np.uint64(1) << half) - np.uint64(1)
    rounds = np.empty(6, np.uint64)
    for r in range(6):
        state += np.uint64(0x9E3779B97F4A7C15)
        rounds[r] = _mix(state)
    for i in range(out.size):
        image = np.uint64(i)
        while True:
            left, right = image >> half, image & mask
            for r in range(6):
                left, right = right, left ^ (_mix(right + rounds[r]) & mask)
            image = (left << half) | right
            if image < np.uint64(bound):
                break
        out[i] = image


@njit(cache=True, nogil=True)
def _mix(z):  # type: ignore[no-untyped-def]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(cache=True, nogil=True)
def bernoulli_indices(seed, tails, guide, bound, out):  # type: ignore[no-untyped-def]
    """Draw ascending indices below bound with equal probabilities, while out has room.

    The gaps between them are geometric. Word j of the seed (as in `kernels_quantize.draw`) gives a
    gap: its length is the number of tails above the word, searched from `guide[its upper bits]` on.
    If all tails are above the word, that many entries are skipped, and the next word continues.

    Args:
        seed: uint64.
        tails: uint64[1024], descending: the probability of a gap above j, in 1 / 2**64.
        guide: int64[1024]: number of tails above every word with these upper ten bits.
        bound: exclusive bound of the indices.
        out: int64[m].

    Returns:
        The number of indices; out.size + 1 if out is too small, without counting further.
    """
    count, index, state = 0, np.int64(-1), np.uint64(seed)
    while True:
        state += np.uint64(0x9E3779B97F4A7C15)
        word = _mix(state)
        gap = guide[word >> np.uint64(54)]
        while gap < tails.size and word < tails[gap]:
            gap += 1
        index += gap
        if gap == tails.size:
            if index >= bound:
                return count
            continue
        index += 1
        if index >= bound:
            return count
        if count == out.size:
            return count + 1
        out[count] = index
        count += 1
