"""The checksum of messages: twice as fast as a copy of the memory.

Measured on one core, 40 MB: this one 11.7 GB/s, a copy 4.5 to 6.3 GB/s, zlib's crc32 1.0 GB/s and
adler32 0.9 GB/s. For uncompressed messages, zlib's would cost more than the rest of a round.

Imported at the first message, because it needs Numba.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_WORD = 32  # bytes of the four lanes together


def checksum(data: np.ndarray) -> int:
    """32 bits that change with any byte of uint8[m], its place and the length m.

    Example:
        >>> a, b = np.zeros(100, np.uint8), np.zeros(100, np.uint8)
        >>> b[70] = 1
        >>> checksum(a) == checksum(b), checksum(a) == checksum(a[:-1])
        (False, False)
    """
    whole = data.size - data.size % _WORD
    if data.ctypes.data % 8:
        data = data.copy()
    last = np.zeros(_WORD, np.uint8)
    last[: data.size - whole] = data[whole:]
    total = int(_mix(data[:whole].view(np.uint64), last.view(np.uint64), data.size))
    return (total ^ (total >> 32)) & 0xFFFFFFFF


@njit(cache=True, nogil=True)
def _mix(words, last, size):  # type: ignore[no-untyped-def]
    """Four independent lanes of add, rotate, multiply by an odd number."""
    prime = np.uint64(0x9E3779B185EBCA87)
    left, right = np.uint64(31), np.uint64(33)
    a, b, c, d = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
    for i in range(0, words.size, 4):
        a += words[i]
        a = ((a << left) | (a >> right)) * prime
        b += words[i + 1]
        b = ((b << left) | (b >> right)) * prime
        c += words[i + 2]
        c = ((c << left) | (c >> right)) * prime
        d += words[i + 3]
        d = ((d << left) | (d >> right)) * prime
    total = np.uint64(size)
    for lane in (a + last[0], b + last[1], c + last[2], d + last[3]):
        total += lane
        total = ((total << left) | (total >> right)) * prime
    return total ^ (total >> np.uint64(29))
