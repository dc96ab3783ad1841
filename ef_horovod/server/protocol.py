"""Messages between workers and servers: their header and its checks.

    0   magic "EFPS"    4 bytes
    4   version         uint8
    5   kind            uint8, see Kind
    6   flags           uint16: 0, or MISSED of an answer, or LEAVES of a WELCOME
    8   worker          uint32, the sender or receiver
    12  bucket          uint32
    16  step            uint32, of the random draws; a dropped step's number is used again
    20  round           uint32, counts the exchanges of a bucket, dropped ones too
    24  length          uint32, bytes that follow the header
    28  checksum        uint32, of these bytes: the low half of their XXH3-64
    32  fingerprint     uint64, of the config: method, seed, buckets, names and shapes

All numbers are little-endian. A payload (docs/wire-format.md) or float32 numbers follow; for kinds
that are not about a bucket, a text in UTF-8. Received data is not trusted: a message is fully
checked before it changes any state.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ef_horovod.common.extras import explained
from ef_horovod.errors import ProtocolError

with explained("ef_horovod.server"):
    import xxhash

MAGIC = b"EFPS"
VERSION = 2  # 1 had a checksum of our own
CONTROL_TAG = 0  # MPI tag of messages not about a bucket; bucket b has tag b + 1
MISSED = 1  # flag of an answer: the receiver's own message comes in a later round
LEAVES = 1  # flag of a WELCOME: the server's process does nothing else and ends with the job
_LAYOUT = struct.Struct("<4sBBHIIIIIIQ")
HEADER_NBYTES = _LAYOUT.size


class Kind(enum.IntEnum):
    """The kind of a message."""

    HELLO = 1  # worker: the config in JSON
    WELCOME = 2  # server: the configs agree; JSON
    PUSH = 3  # worker: a bucket's payload
    PAYLOAD = 4  # server: a bucket's answer as a payload
    NUMBERS = 5  # server: a bucket's answer as float32 numbers
    DROP = 6  # server: some worker's gradient was not finite, the step is dropped
    REFUSED = 7  # server: the worker's message was refused; a sentence
    ABORT = 8  # server: the job ends; a sentence
    BYE = 9  # worker: it ends; empty or the error's sentence; server with a quorum: confirms it
    SAVE = 10  # worker: write a checkpoint of the state after this step; JSON
    SAVED = 11  # server: done; JSON


class Message(NamedTuple):
    """A header."""

    kind: Kind
    worker: int = 0
    bucket: int = 0
    step: int = 0
    round: int = 0
    fingerprint: int = 0
    flags: int = 0


def pack(message: Message, body: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Header and body in one buffer.

    Args:
        message: the header's fields.
        body: uint8[m].
        out: uint8 buffer of at least 40 + m bytes, or None for a new buffer.

    Returns:
        uint8[40 + m], the start of `out`.
    """
    if out is None:
        out = np.empty(HEADER_NBYTES + body.size, np.uint8)
    out = out[: HEADER_NBYTES + body.size]
    out[HEADER_NBYTES:] = body
    _LAYOUT.pack_into(
        out.data,
        0,
        MAGIC,
        VERSION,
        message.kind,
        message.flags,
        message.worker,
        message.bucket,
        message.step,
        message.round,
        body.size,
        _checksum(out[HEADER_NBYTES:]),
        message.fingerprint,
    )
    return out


def unpack(data: np.ndarray) -> tuple[Message, np.ndarray]:
    """Header and body of a received message, uint8[m].

    Raises:
        ProtocolError: it is not a message, or was cut off or damaged on the way.

    Example:
        >>> sent = pack(Message(Kind.BYE, worker=3), np.zeros(0, np.uint8))
        >>> unpack(sent)[0].worker
        3
    """
    if data.size < HEADER_NBYTES:
        raise ProtocolError(
            f"a message has {data.size} bytes, expected at least the {HEADER_NBYTES} of its "
            "header; something else than ef_horovod sends here"
        )
    magic, version, kind, flags, worker, bucket, step, turn, length, check, fingerprint = (
        _LAYOUT.unpack_from(data.data)
    )
    if magic != MAGIC or version != VERSION or kind not in Kind.__members__.values():
        raise ProtocolError(
            f"a message starts with magic {magic!r}, version {version} and kind {kind}, expected "
            f"{MAGIC!r}, {VERSION} and a known kind; install the same ef_horovod on all ranks, or "
            "see who else sends here"
        )
    body = data[HEADER_NBYTES:]
    if length != body.size:
        raise ProtocolError(
            f"a message announces {length} bytes and has {body.size}, expected the same; it was "
            "cut off on the way"
        )
    if _checksum(body) != check:
        raise ProtocolError(
            f"the checksum of a message of {length} bytes is {_checksum(body):#010x}, expected "
            f"{check:#010x}; it was damaged on the way"
        )
    return Message(Kind(kind), worker, bucket, step, turn, fingerprint, flags), body


def _checksum(body: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(body.data) & 0xFFFFFFFF


def text_body(text: str) -> np.ndarray:
    """A text as a body: uint8[m]."""
    return np.frombuffer(text.encode(), np.uint8)


def body_text(body: np.ndarray) -> str:
    """The text of a body."""
    return body.tobytes().decode(errors="replace")


def fingerprint(facts: Sequence[str]) -> int:
    """64-bit hash of the facts that workers and servers must agree on, one line per fact."""
    digest = hashlib.sha256("\n".join(facts).encode()).digest()
    return int.from_bytes(digest[:8], "little")
