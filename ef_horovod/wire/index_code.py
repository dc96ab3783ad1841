"""Codes of index sets, see docs/wire-format.md: of two codes, the shorter one is used.

The number of bytes depends only on the set's size k and the vector's length d, not on the indices.
So a payload's size is known in advance and equal on all ranks and in all steps, and Horovod's
response cache hits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ef_horovod.errors import PayloadError

_PRECISION = 12  # kernels_indices.PRECISION, without importing Numba to know a size
_ONE = 1 << 62  # 1 in fixed point; integers, so that all machines agree
_RAREST_ESCAPE = 128  # its least frequency: rounding would distort smaller ones
_FRACTION = 1024  # costs are in 1 / _FRACTION bits


def indices_nbytes(k: int, num_elements: int) -> int:
    """Exact size of k coded indices below `num_elements`."""
    if k == 0:
        return 0
    return min(_elias_fano_nbytes(k, num_elements), _gap_plan(k, num_elements).nbytes)


def _takes_elias_fano(k: int, num_elements: int) -> bool:
    return _elias_fano_nbytes(k, num_elements) <= _gap_plan(k, num_elements).nbytes


def encode_indices(indices: np.ndarray, num_elements: int) -> np.ndarray:
    """Code ascending indices below `num_elements`.

    Args:
        indices: int64[k], strictly ascending.
        num_elements: exclusive bound of the indices.

    Returns:
        uint8[indices_nbytes(k, num_elements)].
    """
    from ef_horovod.arrays import kernels_indices as kernels

    k = indices.size
    if k == 0:
        return np.zeros(0, np.uint8)
    if _takes_elias_fano(k, num_elements):
        out = np.zeros(_elias_fano_nbytes(k, num_elements), np.uint8)
        bits = low_bits(k, num_elements)
        split = _low_nbytes(k, bits)
        kernels.encode_elias_fano(indices, bits, out[:split], out[split:])
        return out
    plan = _gap_plan(k, num_elements)
    words = np.zeros(plan.low_words + plan.high_words, np.uint32)
    low, high = words[: plan.low_words], words[plan.low_words :]
    symbols = _symbols(plan.ratio)
    escape_bits = (len(symbols) - 1).bit_length() - 1
    if not kernels.encode_gaps(indices, plan.low_bits, escape_bits, symbols, low, high):
        raise ValueError(f"got indices that do not ascend below {num_elements}; sort them first")
    return words.astype("<u4", copy=False).view(np.uint8)


def decode_indices(code: np.ndarray, k: int, num_elements: int) -> np.ndarray:
    """The k ascending indices in `code`, a uint8[indices_nbytes(k, num_elements)].

    Raises:
        PayloadError: no k ascending indices give this code in `encode_indices`.
    """
    if code.size != indices_nbytes(k, num_elements):
        raise PayloadError(
            f"index code has {code.size} bytes, expected {indices_nbytes(k, num_elements)}; it was "
            "cut off on the way"
        )
    indices = np.empty(k, np.int64)
    good = _decode_into(indices, code, num_elements) if k else 0
    if good != k:
        raise PayloadError(
            f"index code holds {good} good indices, expected {k} ascending ones below "
            f"{num_elements}; it was damaged on the way"
        )
    return indices


def _decode_into(indices: np.ndarray, code: np.ndarray, num_elements: int) -> int:
    """Number of valid indices; more than `indices` has room for if the code goes on."""
    from ef_horovod.arrays import kernels_indices as kernels

    k = indices.size
    if _takes_elias_fano(k, num_elements):
        bits = low_bits(k, num_elements)
        low, high = np.split(code, [_low_nbytes(k, bits)])
        return int(kernels.decode_elias_fano(low, high, bits, num_elements, indices))
    plan = _gap_plan(k, num_elements)
    words = np.frombuffer(code.tobytes(), "<u4")  # an aligned copy
    low, high = words[: plan.low_words], words[plan.low_words :]
    table, escape = _table(plan.ratio), len(_frequencies(plan.ratio)) - 1
    return int(kernels.decode_gaps(low, high, plan.low_bits, table, escape, num_elements, indices))


# The gap code: lower bits verbatim, upper parts by a range coder (rANS; Duda 2013).


class GapPlan(NamedTuple):
    """Parameters of the gap code for k indices below a bound."""

    low_bits: int  # of each gap, sent verbatim
    ratio: int  # an upper part of j + 1 is ratio / 256 times as likely as one of j
    low_words: int  # of 32 bits
    high_words: int

    @property
    def nbytes(self) -> int:
        return 4 * (self.low_words + self.high_words)


@lru_cache(maxsize=1024)
def _gap_plan(k: int, num_elements: int) -> GapPlan:
    """Gaps of a random set are geometric: each is 1 - k / d times as likely as the next shorter."""
    ratio, bits = ((num_elements - k) * _ONE) // num_elements, 0
    while (squared := ratio * ratio // _ONE) >= _ONE // 256 * 200:
        # With a ratio this close to 1, another lower bit is almost uniform.
        ratio, bits = squared, bits + 1
    ratio = max((512 * ratio // _ONE + 1) // 2, 1)
    high_words = 2 + _upper_nbits(k, (num_elements - k) >> bits, ratio) // 32
    return GapPlan(bits, ratio, (k * bits + 31) // 32, high_words)


def _upper_nbits(k: int, total: int, ratio: int) -> int:
    """Upper bound of the bits for k upper parts whose sum is `total`."""
    escape, offset, escape_cost = _line(ratio)
    return -(-(k * offset + total * escape_cost) // (escape * _FRACTION))


@lru_cache(maxsize=256)
def _line(ratio: int) -> tuple[int, int, int]:
    """(escape, a, b): no upper part j costs more than (a + b j) / (escape * _FRACTION) bits.

    With exactly geometric frequencies the cost is linear, and all sets cost the same. Frequencies
    are rounded, so this is the lowest line above all symbols, for the given cost of the escape.
    """
    *costs, escape_cost = map(_cost, _frequencies(ratio))
    escape = len(costs)
    offset = max(escape * cost - symbol * escape_cost for symbol, cost in enumerate(costs))
    return escape, offset, escape_cost


def _cost(frequency: int) -> int:
    """Cost of a symbol in 1 / _FRACTION bits: log2 of 2**_PRECISION / frequency, rounded up.

    The added 1 covers the coder's rounding: per symbol, its state grows by an extra factor of up to
    1 + 2**(_PRECISION - 31), which is 3e-6 bits.
    """
    return _PRECISION * _FRACTION - ((frequency**_FRACTION).bit_length() - 1) + 1


def _frequencies(ratio: int) -> list[int]:
    """For upper parts 0 ... e - 1, and the escape for e and more, in 1 / 2**_PRECISION."""
    escape = 16
    while escape > 1 and _tail(ratio, escape) < _RAREST_ESCAPE:
        escape //= 2
    tails = [_tail(ratio, part) for part in range(escape + 1)]
    return [tails[part] - tails[part + 1] for part in range(escape)] + tails[-1:]


def _tail(ratio: int, part: int) -> int:
    """The share of upper parts of at least `part`, in 1 / 2**_PRECISION, rounded."""
    return ((ratio**part << (_PRECISION + 1)) // 256**part + 1) // 2


@lru_cache(maxsize=256)
def _symbols(ratio: int) -> np.ndarray:
    """For encode_gaps: uint64[e + 1, 4]."""
    frequencies, rows, start = _frequencies(ratio), [], 0
    for frequency in frequencies:
        shift = (frequency - 1).bit_length() - 1
        rows.append((frequency, start, -(-(1 << (64 + shift)) // frequency), shift))
        start += frequency
    return np.array(rows, np.uint64)


@lru_cache(maxsize=256)
def _table(ratio: int) -> np.ndarray:
    """For decode_gaps: uint32[2**_PRECISION]."""
    frequencies = np.array(_frequencies(ratio))
    symbols = np.repeat(np.arange(frequencies.size), frequencies)
    starts = (np.cumsum(frequencies) - frequencies)[symbols]
    offsets = np.arange(symbols.size) - starts
    return (frequencies[symbols] << 18 | offsets << 5 | symbols).astype(np.uint32)


# The code of Elias (1974) and Fano (1971): shorter for few indices.


@lru_cache(maxsize=1024)
def low_bits(k: int, num_elements: int) -> int:
    """Low bits of each index that the Elias-Fano code stores verbatim, for the smallest total."""
    return min(range(32), key=lambda bits: k * bits + _unary_nbits(k, num_elements, bits))


def _elias_fano_nbytes(k: int, num_elements: int) -> int:
    bits = low_bits(k, num_elements)
    return _low_nbytes(k, bits) + (_unary_nbits(k, num_elements, bits) + 7) // 8


def _low_nbytes(k: int, bits: int) -> int:
    return (k * bits + 7) // 8


def _unary_nbits(k: int, num_elements: int, bits: int) -> int:
    return k + ((num_elements - 1) >> bits)
