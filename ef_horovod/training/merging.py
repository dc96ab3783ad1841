"""Merged error-feedback state: what all ranks keep together, by parameter name.

It loads on any number of ranks, with another exchange and other buckets. Each method says what
becomes of its fields (`ef_horovod.methods.merging`). With exchange="hierarchical", a node counts as
one worker.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ef_horovod.arrays import namespace
from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.channel import Channel
from ef_horovod.methods.merging import Merge
from ef_horovod.training.buckets import Slot
from ef_horovod.training.entries import Entry, Filled, entries
from ef_horovod.transports.base import Transport

Parameters = dict[str, dict[str, Any]]  # {parameter name: {"worker.error": float32[m] or number}}


def merge(buckets: Sequence[Filled], transport: Transport, *, weight: float = 1.0) -> Parameters:
    """The merged state of all ranks, on each of them; collective: a float64 sum of it.

    Args:
        buckets: with the same parameters on all ranks.
        transport: to the ranks that take part.
        weight: of these ranks' vectors, if they were more when they got their state.

    Raises:
        UnsupportedError: a method's state cannot be merged, or servers keep a part of it.
    """
    if transport.has_server:
        raise UnsupportedError(
            "got a state for any number of ranks with exchange='server', expected an exchange "
            "between ranks, because servers keep a part of it; save by checkpoint(), for a job "
            "with as many workers"
        )
    layouts = [(bucket, list(_layout(bucket))) for bucket in buckets]  # raises before sending
    parameters: Parameters = {}
    for i, (bucket, layout) in enumerate(pair for pair in layouts if pair[1]):
        part = _contribution(bucket, layout)
        totals = np.asarray(transport.allreduce(f"merge.{i}", part)())
        for room in layout:
            part = totals[room.start : room.start + room.cells]
            number = room.length is None
            value = float(part[0] / part[1]) if number else np.float32(part * weight)
            parameters.setdefault(room.slot.name, {})[room.key] = value
    return parameters


def merged_lengths(buckets: Sequence[Filled]) -> list[int]:
    """Lengths of the vectors that `merge` sums, for ranks that have none of this state."""
    return [length for bucket in buckets if (length := sum(r.cells for r in _layout(bucket)))]


def keeps_alone(buckets: Sequence[Filled]) -> bool:
    """Whether some rank keeps state that no other one has, and that is not a worker's own."""
    return any(
        entry.half == "server" and _holders(entry) < _workers(entry)
        for bucket in buckets
        for entry in entries(bucket)
    )


def _contribution(bucket: Filled, layout: Sequence[Room]) -> np.ndarray:
    """This rank's part of a bucket's merged state, float64; the sum over ranks is the state."""
    part = np.zeros(sum(room.cells for room in layout), np.float64)
    rooms = {(room.slot.name, room.key): room for room in layout}
    for entry in entries(bucket):
        weight = 1.0 / _holders(entry) / (_workers(entry) if _rule(entry) in _BY_WORKER else 1)
        value = entry.value
        host = namespace(value).to_host(value) if hasattr(value, "shape") else None
        for slot, start, stop in entry.places(bucket.slots):
            room = rooms[slot.name, _key(entry)]
            if host is None:  # each rank and slice that has the number counts once
                part[room.start : room.start + 2] += float(value), 1
            else:
                at = room.start + _offset(entry, slot, start)
                part[at : at + stop - start] += host[start:stop] * np.float64(weight)
    return part


def split(buckets: Sequence[Filled], parameters: Parameters) -> None:
    """Load the result of `merge` into this rank's buckets.

    Raises:
        ValueError: other parameters, sizes or fields; then nothing has changed.
    """
    mine, theirs = sizes(buckets), {
        name: {key: len(v) if hasattr(v, "shape") else None for key, v in fields.items()}
        for name, fields in parameters.items()
    }  # fmt: skip
    if mine != theirs:
        name = min(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
        raise ValueError(
            f"got an error-feedback state in which '{name}' has {theirs.get(name)}, expected "
            f"{mine.get(name)}; load it into the same model with the same compression (and the "
            "same dense= and network, if they decide what is compressed), or start without it"
        )
    for bucket in buckets:
        for entry in list(entries(bucket)):
            for slot, start, stop in entry.places(bucket.slots):
                merged = parameters[slot.name][_key(entry)]
                if hasattr(entry.value, "shape"):
                    at = _offset(entry, slot, start)
                    _write(entry, start, merged[at : at + stop - start])
                else:
                    entry.put(_as_number(merged, like=entry.value))


def sizes(buckets: Sequence[Filled]) -> dict[str, dict[str, int | None]]:
    """{parameter name: {"worker.error": its length, or None for a number}}, on all ranks alike."""
    found: dict[str, dict[str, int | None]] = {}
    for bucket in buckets:
        for room in _layout(bucket):
            found.setdefault(room.slot.name, {})[room.key] = room.length
    return found


class Room(NamedTuple):
    """The place of a parameter's field in a bucket's merged state."""

    slot: Slot
    key: str  # "worker.error"
    length: int | None  # None: a number, kept as its sum and how many were added
    start: int

    @property
    def cells(self) -> int:
        return 2 if self.length is None else self.length


def _layout(bucket: Filled) -> Iterator[Room]:
    """The rooms of a bucket's merged state; the same on all ranks, also on one without a slice."""
    channel = bucket.channel
    fields, start = dict(_fields(channel)), 0
    for slot in bucket.slots:
        for key, is_vector in fields.items():
            length = slot.stop - slot.start
            if not channel.method.sliceable:
                d, field = channel.gradient.shape[0], key.partition(".")[2]
                first, last = channel.method.span(field, slot.start, slot.stop, d)
                length = last - first
            room = Room(slot, key, length if is_vector else None, start)
            start += room.cells
            yield room


def _fields(channel: Channel) -> Iterator[tuple[str, bool]]:
    """Names of the fields that a channel's method keeps, and whether they are vectors.

    Raises:
        UnsupportedError: the method does not say how one is merged.
    """
    method = channel.method
    method.require_mergeable()
    length = 1 if method.sliceable else channel.gradient.shape[0]
    worker, server = method.init(np.zeros(length, np.float32))
    for half, state in (("worker", worker), ("server", server)):
        for field, value in state._asdict().items():
            if value is None or field in method.scratch:
                continue
            key = f"{half}.{field}"
            if key not in (method.merging or {}):
                raise UnsupportedError(
                    f"got {method!r} without an entry for {key!r} in `merging`, expected one for "
                    "each field that is kept between steps; add it, or name it in `scratch`"
                )
            yield key, isinstance(value, tuple) or hasattr(value, "shape")


_BY_WORKER = Merge.SUM, Merge.EACH  # merged: divided by the number of workers


def _key(entry: Entry) -> str:
    """The field's name, without the number in a tuple of vectors."""
    return f"{entry.half}.{entry.field.partition('.')[0]}"


def _rule(entry: Entry) -> Merge:
    return (entry.piece.channel.method.merging or {})[_key(entry)]


def _workers(entry: Entry) -> int:
    return entry.piece.channel._transport.size


def _holders(entry: Entry) -> int:
    """How many ranks keep this field of this slice."""
    transport = entry.piece.channel._transport
    return 1 if entry.half == "server" and transport.has_server else transport.size


def _offset(entry: Entry, slot: Slot, start: int) -> int:
    """Where a value's part, which begins at `start`, lies in the parameter's merged vector."""
    return entry.piece.start + start - slot.start if entry.piece.channel.method.sliceable else 0


def _write(entry: Entry, start: int, part: np.ndarray) -> None:
    xp, value = namespace(entry.value), entry.value
    if _rule(entry) is Merge.SUM:
        part = part * np.float32(_workers(entry))
    xp.write(value, start, xp.from_host(part.copy(), getattr(value, "device", None)))


def _as_number(mean: float, like: Any) -> Any:
    """A mean of numbers as one of their kind: True if all were, or the whole number below."""
    return mean if isinstance(like, float) else type(like)(math.floor(mean + 1e-9))
