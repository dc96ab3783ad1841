"""The parts of an error-feedback state: which parameters they belong to, and where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from ef_horovod.exchange.channel import Channel, Piece
from ef_horovod.training.buckets import Slot


class Filled(Protocol):
    """A channel with error-feedback state, and the slots of its vectors."""

    channel: Channel
    slots: list[Slot]


class Entry(NamedTuple):
    """A vector or a number in the error-feedback state of a piece."""

    piece: Piece
    half: str  # "worker" or "server"
    field: str
    value: Any

    @property
    def name(self) -> str:
        return f"{self.piece.name}{self.half}.{self.field}"

    def places(self, slots: Sequence[Slot]) -> Iterator[tuple[Slot, int, int]]:
        """The parameters in the piece, with start and stop of their part in the value."""
        channel, offset = self.piece.channel, self.piece.start
        d = channel.gradient.shape[0]
        for slot in slots:
            start, stop = (min(max(at - offset, 0), d) for at in (slot.start, slot.stop))
            if start < stop or slot.start == slot.stop:
                yield slot, *channel.method.span(self.field, start, stop, d)

    def put(self, number: Any) -> None:
        """Replace the number."""
        channel = self.piece.channel
        held = getattr(channel, self.half)
        setattr(channel, self.half, held._replace(**{self.field: number}))


def entries(bucket: Filled) -> Iterator[Entry]:
    """The error-feedback state of a bucket's channel."""
    for piece in bucket.channel.pieces():
        for half in ("worker", "server"):
            held = getattr(piece.channel, half)
            for field, value in held._asdict().items() if held is not None else ():
                if value is None or field in piece.channel.method.scratch:
                    continue
                if isinstance(value, tuple):
                    for i, part in enumerate(value):
                        yield Entry(piece, half, f"{field}.{i}", part)
                else:
                    yield Entry(piece, half, field, value)
