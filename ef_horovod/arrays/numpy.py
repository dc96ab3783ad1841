"""Array functions for NumPy; torch CPU tensors use them too, as views.

Unless a docstring says otherwise, `x` is a flat, contiguous float32[n] that a function may change
in place. Lengths are not checked, because callers inside the package guarantee them.
"""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ef_horovod.arrays.numpy_indices import *  # noqa: F403 - the code of index sets
from ef_horovod.arrays.numpy_matrices import *  # noqa: F403 - low rank
from ef_horovod.arrays.numpy_quantize import *  # noqa: F403 - the quantizers' part

_SAMPLES = 1 << 15  # sample about this many entries,
_SAMPLED = 127  # but at most one in this many; a prime, unlike usual row lengths of matrices
_LEAST = np.float32(1e-45)  # the smallest float32 above zero
_BIN_SHIFT = 19  # exponent_histogram's bins: exponent and four mantissa bits
_DIGITS = ((19, 12), (7, 12), (0, 7))  # shift and width of three parts of a magnitude's bits


class Like(NamedTuple):
    """Framework, shape, dtype and device of a caller's array, to return results alike."""

    xp: ModuleType
    shape: tuple[int, ...]
    dtype: Any
    device: Any


def like(x: np.ndarray) -> Like:
    """Shape, dtype and device of x, without keeping x alive."""
    import ef_horovod.arrays.numpy as xp

    return Like(xp, x.shape, x.dtype, None)


def is_float(x: np.ndarray) -> bool:
    """Whether x holds floating-point numbers; only these can be compressed."""
    return np.issubdtype(x.dtype, np.floating)


def why_not_writable(x: np.ndarray) -> str:
    """Why kernels cannot change x in place; empty if they can."""
    if not x.flags.writeable:
        return "is read-only"
    return "" if x.flags.c_contiguous else "is a view with gaps"


def is_float64(x: np.ndarray) -> bool:
    """Whether x has more precision than the float32 of payloads."""
    return x.dtype == np.float64


def detached(x: np.ndarray) -> np.ndarray:
    """x itself, outside of any automatic differentiation."""
    return x


def flat_float32(x: np.ndarray, *, writable: bool = False) -> np.ndarray:
    """x as contiguous float32[n]: a view where x already is one, else a copy.

    With `writable`, also a copy where x is read-only.
    """
    with np.errstate(over="ignore"):  # an overflow gives inf, which the compressor rejects
        flat = np.ascontiguousarray(x, dtype=np.float32).reshape(-1)
    return flat.copy() if writable and not flat.flags.writeable else flat


def shaped(flat: np.ndarray, target: Like) -> np.ndarray:
    """A flat float32[n] in the shape of `target`."""
    return flat.reshape(target.shape)


def restore(flat: np.ndarray, target: Like) -> np.ndarray:
    """A flat float32[n] in the shape and dtype of `target`."""
    return flat.reshape(target.shape).astype(target.dtype, copy=False)


def zeros(length: int, device: Any = None) -> np.ndarray:
    """float32[length] of zeros."""
    return np.zeros(length, np.float32)


def host_view(x: np.ndarray) -> np.ndarray | None:
    """x as a NumPy array that shares its memory; None if it is not on the host."""
    return x


def address(x: np.ndarray) -> int:
    """Start of x's memory: equal for an array and a view of all of it."""
    return x.ctypes.data


def fill(x: np.ndarray, value: float) -> None:
    """x = value."""
    x.fill(value)


def assign(x: np.ndarray, y: np.ndarray) -> None:
    """x = y."""
    np.copyto(x, y)


def read(x: np.ndarray, start: int, stop: int) -> np.ndarray:
    """A copy of x[start:stop]."""
    return x[start:stop].copy()


def write(x: np.ndarray, start: int, values: np.ndarray) -> None:
    """x[start : start + n] = values, of n numbers in any shape and float dtype."""
    np.copyto(x[start : start + values.size], values.reshape(-1), casting="same_kind")


def divide(x: np.ndarray, divisor: float, out: np.ndarray) -> None:
    """out = x / divisor; `out` may be x."""
    np.divide(x, np.float32(divisor), out=out)


def divide_checked(x: np.ndarray, divisor: float, out: np.ndarray) -> bool:
    """out = x / divisor; returns whether all of it is finite. One pass; `out` may be x."""
    if address(x) != address(out):
        np.copyto(out, x)
    even = out.size - out.size % 2
    good = _kernels().divide(out, np.float32(divisor), out[:even].view(np.uint64))
    return bool(good) and bool(np.isfinite(out[even:]).all())


def add(x: np.ndarray, y: np.ndarray, weight: float = 1.0) -> None:
    """x += weight * y."""
    _kernels().add(x, y, np.float32(weight))


def average(x: np.ndarray, y: np.ndarray, weight: float, out: np.ndarray) -> None:
    """out = (1 - weight) * x + weight * y; `out` may be x."""
    np.multiply(x, np.float32(1.0 - weight), out=out)
    _kernels().add(out, y, np.float32(weight))


def average_square(x: np.ndarray, y: np.ndarray, weight: float, out: np.ndarray) -> None:
    """out = (1 - weight) * x + weight * y**2; `out` may be x."""
    _kernels().average_square(x, y, np.float32(1.0 - weight), np.float32(weight), out)


def divide_by_root(
    x: np.ndarray,
    squares: np.ndarray,
    least: float,
    of_zero: float,
    eps: float,
    out: np.ndarray,
) -> None:
    """out = x / (max(sqrt(squares), least) + eps), of_zero for sqrt(0); `out` may be x."""
    _kernels().divide_by_root(
        x, squares, np.float32(least), np.float32(of_zero), np.float32(eps), out
    )


def multiply_by_root(
    x: np.ndarray,
    squares: np.ndarray,
    least: float,
    of_zero: float,
    eps: float,
    out: np.ndarray,
) -> None:
    """out = x * (max(sqrt(squares), least) + eps), of_zero for sqrt(0); `out` may be x."""
    _kernels().multiply_by_root(
        x, squares, np.float32(least), np.float32(of_zero), np.float32(eps), out
    )


def abs_sum(x: np.ndarray) -> float:
    """Sum of magnitudes, in float64; not finite if an entry is not."""
    total = float(_kernels().abs_sum(x))
    # Sums of numbers near the largest float32 overflow; such vectors are summed again.
    return total if math.isfinite(total) else float(_kernels().abs_sum_wide(x))


def abs_max(x: np.ndarray) -> float:
    """Largest magnitude, 0 for an empty x; not finite if an entry is not."""
    return float(np.uint32(_kernels().largest(x.view(np.uint32))).view(np.float32))


def squared_norm(x: np.ndarray) -> float:
    """Sum of squares, in float64."""
    return float(_kernels().squared_norm(x))


def to_host(x: np.ndarray) -> np.ndarray:
    """x itself: a NumPy array that shares memory with x where it can."""
    return x


def from_host(values: np.ndarray, device: Any = None) -> np.ndarray:
    """A host array as this framework's array, sharing memory where it can."""
    return values


def top_k(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k entries of largest magnitude; among equals the lower index wins. x is not changed.

    Usually reads x once: a sample gives a threshold that slightly more than k entries reach, and
    the k largest are selected among these. Where that fails, a histogram of exponents decides.

    Returns:
        (int64[k] ascending indices, where x is, and float32[k] values on the host). If x holds a
        NaN or an infinity, so do the values, provided k > 0.
    """
    k = min(k, x.size)
    if k == 0:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    candidates, values = _candidates(x, k)
    # As unsigned bits, magnitudes sort like floats, with infinity and NaN at the top.
    order = np.abs(values).view(np.uint32)
    largest = np.partition(order, order.size - k)[order.size - k :]
    ties = np.count_nonzero(largest == largest[0])  # the lowest indices are kept
    kept, their_values = np.empty(k + 1, np.int64), np.empty(k + 1, np.float32)
    _kernels().keep_largest(order, largest[0], ties, candidates, values, kept, their_values)
    return kept[:k], their_values[:k]


def _candidates(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All entries that reach some threshold, as from `at_least`: at least k, rarely many more."""
    if x.size > 4 * _SAMPLES:
        sample = np.abs(x[:: _stride(x.size)])
        share = k / x.size
        # Four standard deviations above the expected rank: too few candidates once in 30,000 calls.
        rank = int(share * sample.size + 4 * math.sqrt(share * sample.size) + 8)
        if rank < sample.size:
            threshold = np.partition(sample, sample.size - rank)[sample.size - rank]
            threshold = max(threshold, _LEAST)  # most entries may be zero
            expected = int(1.5 * rank / sample.size * x.size) + 1024
            count, *found = _reaching(x, threshold, expected)
            if k <= count <= expected:
                return found[0], found[1]
    return _candidates_by_histogram(x, k)


def _stride(length: int) -> int:
    """Distance between sampled entries."""
    return max(length // _SAMPLES, _SAMPLED)


def _candidates_by_histogram(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    counts = np.zeros(4096, np.int64)
    _kernels().exponent_histogram(x.view(np.uint32), counts)
    reaching = np.cumsum(counts[::-1])[::-1]  # entries at or above each bin
    lowest = int(np.flatnonzero(reaching >= k)[-1])
    threshold = np.array(lowest << _BIN_SHIFT, np.uint32).view(np.float32)[()]
    if not np.isfinite(threshold):  # at least k entries are not finite: they have no order
        threshold = np.float32(np.inf)
    most = x.size if threshold == np.inf else int(reaching[lowest])
    if most > 2 * k + 4 * _SAMPLES:  # many almost equal entries would take five vectors of memory
        return _exactly(x, k, counts)
    return _reaching(x, float(threshold), most)[1:]


def _exactly(x: np.ndarray, k: int, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`top_k` without memory except the results, from the counts of `exponent_histogram`."""
    bits = x.view(np.uint32)
    threshold, above = 0, 0  # upper bits of the k-th largest; number of entries above these
    for shift, width in _DIGITS:
        if shift < _BIN_SHIFT:
            counts = np.zeros(1 << width, np.int64)
            _kernels().digit_histogram(bits, np.uint32(threshold), shift, counts)
        reaching = above + np.cumsum(counts[::-1])[::-1]
        digit = int(np.flatnonzero(reaching >= k)[-1])
        above = int(reaching[digit] - counts[digit])
        threshold = threshold << width | digit
    indices = np.empty(k, np.int64)
    _kernels().collect_largest(bits, np.uint32(threshold), k - above, indices)
    return indices, x[indices]


def at_least(x: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Ascending indices of |x_i| >= threshold or NaN, int64; their values on the host."""
    most = min(x.size, 1024 + x.size // 64)
    count, *found = _reaching(x, threshold, most)
    if count > most:  # too many for the usual room: run again with room for all
        _, *found = _reaching(x, threshold, count)
    return found[0], found[1]


def _reaching(x: np.ndarray, threshold: float, most: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Number of entries with |x_i| >= threshold or NaN; indices and values of the first `most`."""
    indices, values = np.empty(most, np.int64), np.empty(most, np.float32)
    count = _kernels().collect_at_least(x, np.float32(threshold), indices, values)
    return count, indices[:count], values[:count]


def take(x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """x[indices] as float32 on the host."""
    out = np.empty(indices.size, np.float32)
    _kernels().take(x, indices, out)
    return out


def scatter_add(x: np.ndarray, indices: np.ndarray, values: np.ndarray, weight: float) -> None:
    """x[indices] += weight * values, for different indices within bounds."""
    _kernels().scatter_add(x, indices, values, np.float32(weight))


def scatter_put(x: np.ndarray, indices: np.ndarray, values: np.ndarray) -> None:
    """x[indices] = values, for different indices within bounds."""
    _kernels().scatter_put(x, indices, values)


def pack_signs(x: np.ndarray, scale: float, *, subtract: bool) -> np.ndarray:
    """uint8[ceil(n / 8)]: bit j of byte i is x[8i + j] >= 0.

    With `subtract`, also x -= scale where the bit is set, x += scale elsewhere, in the same pass.
    """
    out = np.empty((x.size + 7) // 8, np.uint8)
    if subtract:
        _kernels().split_signs(x, np.float32(scale), out)
    else:
        _kernels().pack_signs(x, out)
    return out


def add_signs(x: np.ndarray, bits: np.ndarray, scale: float) -> None:
    """x += scale where the bit is set, x -= scale elsewhere."""
    _kernels().add_signs(x, bits, np.float32(scale))


def narrow(x: np.ndarray, kind: str, shift: int, *, subtract: bool) -> np.ndarray:
    """uint16[n]: x * 2**shift rounded to "float16" or "bfloat16", clipped to stay below 2**15.

    With `subtract`, x becomes the rounding error.
    """
    out = np.empty(x.size, np.uint16)
    for start in range(0, x.size, _CHUNK):
        part = x[start : start + _CHUNK]
        scaled = (part * np.float64(2.0) ** shift).astype(np.float32)
        np.clip(scaled, -LARGEST[kind], LARGEST[kind], out=scaled)
        out[start : start + _CHUNK] = _ROUND[kind](scaled)
        if subtract:
            part -= _widen(out[start : start + _CHUNK], kind, shift)
    return out


def add_widened(x: np.ndarray, codes: np.ndarray, kind: str, shift: int, weight: float) -> None:
    """x += weight * the numbers that `narrow` coded."""
    for start in range(0, x.size, _CHUNK):
        wide = _widen(codes[start : start + _CHUNK], kind, shift)
        x[start : start + _CHUNK] += np.float32(weight) * wide


_CHUNK = 1 << 14  # the float64 temporaries of a chunk fit the cache
LARGEST = {"float16": np.float32(32752), "bfloat16": np.float32(32640)}  # below 2**15


def _bfloat16_bits(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


_ROUND = {
    "float16": lambda x: x.astype(np.float16).view(np.uint16),
    "bfloat16": _bfloat16_bits,
}


def _widen(codes: np.ndarray, kind: str, shift: int) -> np.ndarray:
    if kind == "float16":
        wide = codes.view(np.float16).astype(np.float64)
    else:
        wide = (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return (wide * 2.0**-shift).astype(np.float32)


@cache
def _kernels() -> ModuleType:
    """The compiled kernels, imported at their first use (importing Numba takes a while)."""
    from ef_horovod.arrays import kernels

    return kernels
