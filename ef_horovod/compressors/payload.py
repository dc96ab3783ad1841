"""Payloads: compressed vectors as bytes, and their decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic

import numpy as np

from ef_horovod import wire
from ef_horovod.arrays import A, Array, dtype_name, namespace, require_writable
from ef_horovod.arrays.numpy import Like
from ef_horovod.common.options import number
from ef_horovod.compressors.registry import compressor_of
from ef_horovod.errors import PayloadError, without_adapter


class Payload(Generic[A]):
    """A compressed vector as the bytes on the wire.

    `bytes(payload)` are exactly these bytes, `payload.nbytes` is their number.
    """

    def __init__(self, data: np.ndarray, like: Like | None = None) -> None:
        self.data = data  # uint8[nbytes]: header and body
        self.header = wire.read_header(data)
        self._like = like
        self._body = data[wire.HEADER_NBYTES :]
        kind = compressor_of(self.header.kind)
        if kind is None or self.header.body_nbytes != self._body.size:
            raise PayloadError(
                f"payload of kind {self.header.kind} has {self._body.size} bytes of body, expected "
                f"a registered kind and {self.header.body_nbytes} bytes; import the module that "
                "defines the compressor on all ranks, or look for damage on the way"
            )
        self.kind = kind

    @classmethod
    def from_bytes(
        cls,
        data: bytes | bytearray | memoryview | np.ndarray,
        num_elements: int | None = None,
    ) -> Payload[np.ndarray]:
        """Read a received payload; it decompresses to a flat NumPy float32 array.

        Args:
            data: the bytes.
            num_elements: length of the vector, if known. Without it, a valid sparse payload of a
                few bytes may have 2**31 - 1 numbers.

        Raises:
            PayloadError: the bytes are not a payload, or one of another length. Damage inside the
                body raises the same error on decompression.

        Example:
            >>> import ef_horovod as ef, numpy
            >>> sent = bytes(ef.OneBit().compress(numpy.array([1.0, -3.0])))
            >>> ef.Payload.from_bytes(sent).decompress()
            array([ 2., -2.], dtype=float32)
        """
        payload: Payload[np.ndarray] = Payload(np.frombuffer(data, np.uint8))
        if num_elements is not None and payload.num_elements != num_elements:
            raise PayloadError(
                f"got {payload}, expected {num_elements} elements; it is of another vector, or was "
                "damaged on the way"
            )
        return payload

    @classmethod
    def from_start(cls, data: np.ndarray) -> Payload:
        """The payload at the start of uint8[m]; the rest is padding."""
        return cls(data[: wire.HEADER_NBYTES + wire.read_header(data).body_nbytes])

    def __iter__(self) -> Any:
        """Always raises: stock Horovod iterates if it got a compressor without an adapter."""
        raise without_adapter(self)

    @property
    def nbytes(self) -> int:
        """Size on the wire, header included."""
        return int(self.data.size)

    @property
    def num_elements(self) -> int:
        """Length of the compressed vector."""
        return self.header.num_elements

    @property
    def is_skip(self) -> bool:
        """Whether the sender asks all ranks to drop this step."""
        return bool(self.header.flags & wire.SKIP)

    @property
    def is_absent(self) -> bool:
        """Whether the sender contributes nothing in this step."""
        return bool(self.header.flags & wire.ABSENT)

    @property
    def is_replacement(self) -> bool:
        """Whether this replaces the tracked gradient instead of being added to it."""
        return bool(self.header.flags & wire.REPLACE)

    def as_replacement(self) -> Payload:
        """The same numbers, flagged to replace the tracked gradient."""
        return self.flagged(wire.REPLACE, self._like)

    def flagged(self, flag: int, like: Like | None) -> Payload:
        """The same body with one more flag in the header; decompresses to an array like `like`."""
        header = self.header._replace(flags=self.header.flags | flag)
        return Payload(np.concatenate([header.pack(), self._body]), like)

    def as_skip(self) -> Payload:
        """A payload of the same kind and size with the flag to drop this step."""
        header = self.header._replace(flags=wire.SKIP)
        body = np.zeros(self._body.size, np.uint8)
        return Payload(np.concatenate([header.pack(), body]), self._like)

    def __bytes__(self) -> bytes:
        return self.data.tobytes()

    def __repr__(self) -> str:
        return f"<{self.kind.__name__} payload: {self.num_elements} elements, {self.nbytes} bytes>"

    def decompress(self) -> A:
        """C(x): same framework, shape, dtype and device as the x that was compressed here.

        Raises:
            PayloadError: the body is malformed or does not fit the number of elements in the
                header, there is not enough memory, or the payload asks to drop the step.
        """
        like = self._like
        if like is None:
            room: Any = self._room()
            self.add_to(room)
            return room
        flat = like.xp.zeros(self.num_elements, like.device)
        self.add_to(flat)
        return like.xp.restore(flat, like)

    def _room(self) -> np.ndarray:
        """float32[d] of zeros, if the body can be one for d elements."""
        self._require_numbers()
        if not self.is_absent:
            self.kind.require_body(self._body, self.num_elements)
        try:
            return np.zeros(self.num_elements, np.float32)
        except MemoryError:
            raise PayloadError(
                f"got {self}, expected at most as many elements as there is memory for; give "
                "Payload.from_bytes the length that is expected, or look for damage on the way"
            ) from None

    def add_to(self, dense: Array, weight: float = 1.0) -> None:
        """dense += weight * C(x), without building C(x) if it is sparse.

        Args:
            dense: float32[d], contiguous.

        Raises:
            PayloadError: the body is malformed; dense is not changed then.
            TypeError: dense is not an array of a supported framework.
            ValueError: dense has another length, dtype or layout, or cannot be changed in place.
        """
        self._require(dense)
        weight = number("add_to", "weight", weight, "(-inf, inf)", "1 adds C(x) as it is")
        if not self.is_absent:
            self.kind.accumulate(self._body, dense, weight)

    def clear(self, x: Array) -> None:
        """x = 0 where the payload has an entry, for float32[d] x; see `Compressor.clear`."""
        self._require(x)
        if not self.is_absent:
            self.kind.clear(self._body, x)

    def _require(self, dense: Array) -> None:
        """Raise unless the payload has numbers and `dense` can take them."""
        namespace(dense)  # raises unless dense is an array
        if tuple(dense.shape) != (self.num_elements,) or dtype_name(dense) != "float32":
            raise ValueError(
                f"got a dense array of shape {tuple(dense.shape)} and dtype {dense.dtype}, "
                f"expected float32[{self.num_elements}]; flatten or convert it first"
            )
        require_writable(dense)
        self._require_numbers()

    def _require_numbers(self) -> None:
        if self.is_skip:
            raise PayloadError(
                "got a payload that asks to drop the step, expected one with numbers; check "
                "is_skip on the payloads of all ranks before using any of them"
            )

    def summands(self) -> np.ndarray:
        """The float32 numbers of a linear compressor's payload, as a view that may be summed into.

        After an allreduce over this view, the payload is the sum over all ranks.
        """
        return self.kind.summands(self._body)


def mean_at_once(messages: Sequence[Payload], workers: int, out: Array, plus: Array | None) -> bool:
    """`Compressor.mean` of payloads, if their class has it and they are not above float32[d].

    Raises:
        PayloadError, ValueError: as `Payload.add_to`; `out` is not changed then.
    """
    for message in messages:
        message._require(out)
    said = [message for message in messages if not message.is_absent]
    host, more = (x if x is None else namespace(x).host_view(x) for x in (out, plus))
    kinds = {message.kind for message in said}
    long = sum(message.nbytes for message in said) > 4 * out.shape[0]  # so would their indices
    if host is None or (more is None) != (plus is None) or len(kinds) != 1 or long:
        return False
    return kinds.pop().mean([message._body for message in said], workers, more, host)
