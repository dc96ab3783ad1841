"""Payload bytes: the header that every payload starts with, and the coding of index sets.

The format is documented in docs/wire-format.md and pinned by golden bytes in the tests. Nothing
read from a payload is trusted: lengths, counts and bounds are checked before memory is touched.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from ef_horovod.errors import PayloadError

MAGIC = 0xEF
VERSION = 1
SKIP = 1  # flag: the sender's gradient was not finite; all ranks drop this step
ABSENT = 2  # flag: the sender says nothing in this step; the body is empty
REPLACE = 4  # flag: what is said takes the place of what was said before; see EF21Plus
MAX_ELEMENTS = 2**31 - 1  # collectives count with C ints; larger models travel in several buckets
MAX_NBYTES = 2**31 - 1  # of a payload, for the same reason

_HEADER = struct.Struct("<BBBBIQ")
HEADER_NBYTES = _HEADER.size


class Header(NamedTuple):
    """The first 16 bytes of a payload."""

    kind: int  # wire_id of the compressor
    flags: int
    body_nbytes: int
    num_elements: int  # length of the compressed vector

    def pack(self) -> np.ndarray:
        """uint8[16]."""
        packed = _HEADER.pack(
            MAGIC, VERSION, self.kind, self.flags, self.body_nbytes, self.num_elements
        )
        return np.frombuffer(packed, np.uint8)


def read_header(data: np.ndarray) -> Header:
    """Parse the header at the start of `data`; the body may be followed by other payloads.

    Args:
        data: uint8[m].

    Raises:
        PayloadError: too short, another magic or version, or lengths that cannot be.
    """
    if data.size < HEADER_NBYTES:
        raise PayloadError(
            f"payload has {data.size} bytes, expected at least the {HEADER_NBYTES} of a header; "
            "it was cut off on the way"
        )
    magic, version, kind, flags, body_nbytes, num_elements = _HEADER.unpack(
        data[:HEADER_NBYTES].tobytes()
    )
    if magic != MAGIC or version != VERSION:
        raise PayloadError(
            f"payload starts with magic {magic:#04x} and version {version}, expected {MAGIC:#04x} "
            f"and {VERSION}; install the same ef_horovod on all ranks"
        )
    if body_nbytes > data.size - HEADER_NBYTES or num_elements > MAX_ELEMENTS:
        raise PayloadError(
            f"payload announces {body_nbytes} bytes for {num_elements} elements, but "
            f"{data.size - HEADER_NBYTES} bytes follow and at most {MAX_ELEMENTS} elements are "
            "allowed; it was cut off or damaged on the way"
        )
    return Header(kind, flags, body_nbytes, num_elements)


def size_class(nbytes: int) -> int:
    """The size that a message of data-dependent length travels with: at most 1/32 larger.

    Horovod remembers a collective by its exact shape and negotiates anew when that changes. Lengths
    that vary from step to step mostly fall into one class.
    """
    step = max(16, 1 << max(nbytes.bit_length() - 6, 0))
    return -(-nbytes // step) * step


def padded(payload: np.ndarray) -> np.ndarray:
    """A payload's bytes filled up with zeros to their size class."""
    out = np.zeros(size_class(payload.size), np.uint8)
    out[: payload.size] = payload
    return out


def padded_nbytes(data: np.ndarray) -> int:
    """How many bytes the padded payload at the start of `data` takes.

    Raises:
        PayloadError: there is none.
    """
    return size_class(HEADER_NBYTES + read_header(data).body_nbytes)


class Fields:
    """Reads a payload's body from left to right and checks that it ends where it should.

    Args:
        body: uint8[m].
        what: name of the compressor, for messages.
    """

    def __init__(self, body: np.ndarray, what: str) -> None:
        self._body, self._what, self._position = body, what, 0

    def array(self, dtype: str, count: int) -> np.ndarray:
        """The next `count` items of a little-endian dtype, as a read-only view where aligned."""
        nbytes = np.dtype(dtype).itemsize * count
        if nbytes > self._body.size - self._position:
            raise PayloadError(
                f"{self._what} payload ends after {self._body.size} bytes, expected {nbytes} more "
                f"at byte {self._position}; it was cut off or damaged on the way"
            )
        part = self._body[self._position : self._position + nbytes]
        self._position += nbytes
        if part.ctypes.data % np.dtype(dtype).itemsize:
            part = part.copy()
        return part.view(dtype)

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        """The next fields of a struct."""
        return layout.unpack(self.array("u1", layout.size).tobytes())

    def end(self) -> None:
        """Raise unless all bytes were read."""
        if self._position != self._body.size:
            raise PayloadError(
                f"{self._what} payload has {self._body.size} bytes, expected {self._position}; "
                "it was damaged on the way"
            )


def low_bits(k: int, num_elements: int) -> int:
    """How many low bits of each index the Elias-Fano code stores verbatim: the smallest total."""
    return min(range(32), key=lambda bits: k * bits + _unary_nbits(k, num_elements, bits))


def indices_nbytes(k: int, num_elements: int) -> int:
    """Exact size of a coded index set: it follows from k and the length, not from the data.

    So a payload's size is known in advance, is equal on all ranks and steps, and keeps Horovod's
    response cache hitting. About 0.5 bit an index over the entropy (8.56 against 8.08 bits at 1 %).
    """
    if k == 0:
        return 0
    bits = low_bits(k, num_elements)
    return (k * bits + 7) // 8 + (_unary_nbits(k, num_elements, bits) + 7) // 8


def encode_indices(indices: np.ndarray, num_elements: int) -> np.ndarray:
    """Code ascending indices below `num_elements` (Elias 1974, Fano 1971).

    Args:
        indices: int64[k], strictly ascending.
        num_elements: exclusive bound of the indices.

    Returns:
        uint8[indices_nbytes(k, num_elements)].
    """
    from ef_horovod.arrays import kernels

    out = np.zeros(indices_nbytes(indices.size, num_elements), np.uint8)
    if indices.size:
        bits = low_bits(indices.size, num_elements)
        split = (indices.size * bits + 7) // 8
        kernels.encode_indices(indices, bits, out[:split], out[split:])
    return out


def decode_indices(code: np.ndarray, k: int, num_elements: int) -> np.ndarray:
    """The k ascending indices in `code`, a uint8[indices_nbytes(k, num_elements)].

    Raises:
        PayloadError: the indices do not ascend, reach the bound, or are not k in number.
    """
    from ef_horovod.arrays import kernels

    indices = np.empty(k, np.int64)
    if k:
        bits = low_bits(k, num_elements)
        split = (k * bits + 7) // 8
        good = kernels.decode_indices(code[:split], code[split:], bits, num_elements, indices)
        if good != k:
            raise PayloadError(
                f"index code holds {good} good indices, expected {k} ascending ones below "
                f"{num_elements}; it was damaged on the way"
            )
    return indices


def _unary_nbits(k: int, num_elements: int, bits: int) -> int:
    return k + ((num_elements - 1) >> bits)
