"""The code of index sets by Elias (1974) and Fano (1971), for NumPy; see docs/wire-format.md.

`arrays/numpy.py` re-exports the array functions. The number of bytes depends only on the set's size
k and the vector's length d, not on the indices. So a payload's size is known in advance and equal
on all ranks and in all steps, and Horovod's response cache hits.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ef_horovod.arrays.grid import bits_nbytes
from ef_horovod.errors import PayloadError

__all__ = ["decode_indices", "encode_indices"]


def indices_nbytes(k: int, d: int) -> int:
    """Exact size of k coded indices below d."""
    if k == 0:
        return 0
    bits = low_bits(k, d)
    return bits_nbytes(k, bits) + (_unary_nbits(k, d, bits) + 7) // 8


@lru_cache(maxsize=1024)
def low_bits(k: int, d: int) -> int:
    """Low bits of each index that are sent verbatim, for the smallest total."""
    return min(range(32), key=lambda bits: k * bits + _unary_nbits(k, d, bits))


def _unary_nbits(k: int, d: int, bits: int) -> int:
    return k + ((d - 1) >> bits)


def encode_indices(x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """uint8[indices_nbytes(k, n)] on the host: the code of ascending indices of x, int64[k].

    Only the length of x counts.
    """
    from ef_horovod.arrays import kernels_indices as kernels

    k, d = indices.size, x.shape[0]
    code = np.zeros(indices_nbytes(k, d), np.uint8)
    if k:
        bits = low_bits(k, d)
        split = bits_nbytes(k, bits)
        low = np.zeros(split // 4 + 1, np.uint32)
        kernels.encode(indices, bits, low, code[split:])
        code[:split] = low.astype("<u4", copy=False).view(np.uint8)[:split]
    return code


def decode_indices(x: np.ndarray, code: np.ndarray, k: int) -> np.ndarray:
    """The k ascending indices of x, int64, in a code of `encode_indices`; x is not changed.

    Raises:
        PayloadError: no k ascending indices of x have this code.
    """
    from ef_horovod.arrays import kernels_indices as kernels

    d = x.shape[0]
    require_length(code, k, d)
    indices = np.empty(k, np.int64)
    if k:
        bits = low_bits(k, d)
        split = bits_nbytes(k, bits)
        low, high = _words(code[:split], "<u4"), _words(code[split:], "<u8")
        good = kernels.decode(low, high, bits, d, indices)
        require_good(good, code, k, d)
    return indices


def _words(part: np.ndarray, dtype: str) -> np.ndarray:
    """uint8[m] as an aligned array of integers, followed by at least 32 zero bits."""
    words = np.zeros(part.size // np.dtype(dtype).itemsize + 2, dtype)
    words.view(np.uint8)[: part.size] = part
    return words.astype(words.dtype.newbyteorder("="), copy=False)


def require_length(code: np.ndarray, k: int, d: int) -> None:
    """Raise unless a code can be one of k indices below d.

    Raises:
        PayloadError: it is shorter or longer.
    """
    if code.size != indices_nbytes(k, d):
        raise PayloadError(
            f"index code has {code.size} bytes, expected {indices_nbytes(k, d)}; it was cut off on "
            "the way"
        )


def require_good(good: int, code: np.ndarray, k: int, d: int) -> None:
    """Raise unless k > 0 indices were found in a code of the right length, and nothing else.

    Args:
        good: indices that ascend below d; more than k if there are more high parts.

    Raises:
        PayloadError: there are more or fewer, or a bit behind the low bits is set.
    """
    used = k * low_bits(k, d)
    if good == k and used % 8 and code[used // 8] >> (used % 8):
        good += 1
    if good != k:
        raise PayloadError(
            f"index code holds {good} good indices, expected {k} ascending ones below {d}; it was "
            "damaged on the way"
        )
