"""Payload bytes: the header of every payload, and the reader of a body.

The format is documented in docs/wire-format.md and pinned by golden bytes in the tests. Payloads
are not trusted: lengths, counts and bounds are checked before memory is accessed.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ef_horovod.errors import PayloadError

MAGIC = 0xEF
VERSION = 2  # a change of what any payload's bytes mean counts it up
SKIP = 1  # flag: the sender's gradient was not finite; all ranks drop this step
ABSENT = 2  # flag: the sender contributes nothing in this step; the body is empty
REPLACE = 4  # flag: these numbers replace the ones tracked so far; see EF21Plus
_FLAGS = SKIP | ABSENT | REPLACE
MAX_ELEMENTS = 2**31 - 1  # collectives count with C ints; larger models take several buckets
MAX_NBYTES = 2**31 - 1  # of a payload, because of the C ints too

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
    """Parse the header at the start of `data`; other payloads may follow the body.

    Args:
        data: uint8[m].

    Raises:
        PayloadError: too short, another magic or version, or impossible lengths.
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
    if flags & ~_FLAGS:
        raise PayloadError(
            f"payload has flags {flags:#04x}, expected at most {_FLAGS:#04x}; it was damaged on "
            "the way"
        )
    if body_nbytes > data.size - HEADER_NBYTES or num_elements > MAX_ELEMENTS:
        raise PayloadError(
            f"payload announces {body_nbytes} bytes for {num_elements} elements, but "
            f"{data.size - HEADER_NBYTES} bytes follow and at most {MAX_ELEMENTS} elements are "
            "allowed; it was cut off or damaged on the way"
        )
    return Header(kind, flags, body_nbytes, num_elements)


def size_class(nbytes: int) -> int:
    """The padded size of a payload with a data-dependent length: at most 1/32 larger.

    Horovod caches a collective by its exact shape and negotiates again when the shape changes.
    Lengths that vary from step to step mostly fall into one class.
    """
    step = max(16, 1 << max(nbytes.bit_length() - 6, 0))
    return -(-nbytes // step) * step


def padded(payload: np.ndarray) -> np.ndarray:
    """A payload's bytes, padded with zeros to their size class."""
    out = np.zeros(size_class(payload.size), np.uint8)
    out[: payload.size] = payload
    return out


def padded_values(values: np.ndarray) -> np.ndarray:
    """float32 numbers, padded with zeros to their size class, at least four in total."""
    out = np.zeros(size_class(max(values.nbytes, 1)) // 4, np.float32)
    out[: values.size] = values
    return out


def payload_nbytes(data: np.ndarray) -> int:
    """Number of bytes of the payload at the start of `data`.

    Raises:
        PayloadError: there is none.
    """
    return HEADER_NBYTES + read_header(data).body_nbytes


def padded_nbytes(data: np.ndarray) -> int:
    """Number of bytes of the padded payload at the start of `data`.

    Raises:
        PayloadError: there is none.
    """
    return size_class(payload_nbytes(data))


class Fields:
    """Reads a payload's body from left to right and checks where it ends.

    Args:
        body: uint8[m].
        what: name of the compressor, for error messages.
        require_values: raises unless the given bytes, the end of the body, can hold k values:
            `require_body` of the values' compressor.
    """

    def __init__(
        self,
        body: np.ndarray,
        what: str,
        require_values: Callable[[np.ndarray, int], None] = lambda _, k: None,
    ) -> None:
        self._body, self._what, self._position = body, what, 0
        self._require_values = require_values

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

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The next fields of a struct."""
        return layout.unpack(self.array("u1", layout.size).tobytes())

    def require_values(self, count: int) -> None:
        """Raise unless the unread bytes can hold `count` values; call it before allocating them."""
        self._require_values(self._body[self._position :], count)

    def most_values(self, limit: int) -> int:
        """Number of values that the unread bytes can hold, up to a limit."""

        def too_many(count: int) -> bool:
            try:
                self.require_values(count)
            except PayloadError:
                return True
            return False

        return max(bisect_left(range(limit + 1), True, key=too_many) - 1, 0)

    def rest(self) -> np.ndarray:
        """uint8: all unread bytes."""
        return self.array("u1", self._body.size - self._position)

    def end(self) -> None:
        """Raise unless all bytes were read."""
        if self._position != self._body.size:
            raise PayloadError(
                f"{self._what} payload has {self._body.size} bytes, expected {self._position}; "
                "it was damaged on the way"
            )
