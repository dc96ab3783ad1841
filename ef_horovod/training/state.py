"""One rank's error-feedback state as a state dict by parameter name, independent of buckets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from ef_horovod.arrays import namespace
from ef_horovod.exchange.channel import Channel, Piece
from ef_horovod.methods.base import Method
from ef_horovod.training.buckets import Slot, own_methods
from ef_horovod.transports.base import Transport


class Filled(Protocol):
    """A channel with error-feedback state, and the slots of its vectors."""

    channel: Channel
    slots: list[Slot]


def save_state(
    buckets: Sequence[Filled], step: int, method: Method, transport: Transport
) -> dict[str, Any]:
    """One rank's error-feedback state, with the facts that identify the job."""
    facts, methods = _facts(method, transport), _texts(own_methods(buckets, method))
    return {**facts, "methods": methods, "step": step, "parameters": read_state(buckets)}


def load_state(
    state: dict[str, Any], buckets: Sequence[Filled], method: Method, transport: Transport
) -> int:
    """Load the result of `save_state` from this rank of an equal job; returns its step.

    Raises:
        ValueError: another rank, number of ranks, method or model; then nothing has changed.
        UnsupportedError: there are servers, and the first step has begun.
    """
    transport.require_not_begun()
    for fact, expected in _facts(method, transport).items():
        if state.get(fact) != expected:
            raise ValueError(
                f"got a compression state of {fact} {state.get(fact)!r}, expected {expected!r}; "
                "load each rank's own file into an equal job, or start without it"
            )
    mine, theirs = _texts(own_methods(buckets, method)), state.get("methods", {})
    for name in sorted(mine.keys() | theirs.keys()):
        found, wanted = theirs.get(name, repr(method)), mine.get(name, repr(method))
        if found != wanted:
            raise ValueError(
                f"got a compression state of '{name}' by {found}, expected one by {wanted}; pass "
                "the dense= of the job that saved it, or start without the state"
            )
    write_state(buckets, state["parameters"])
    return int(state["step"])


def read_state(buckets: Sequence[Filled]) -> dict[str, dict[str, Any]]:
    """{parameter name: {"worker.error": array, ...}}; arrays are copies."""
    parameters: dict[str, dict[str, Any]] = {}
    for bucket in buckets:
        for memory in _entries(bucket):
            for slot, start, stop in memory.places(bucket.slots):
                value = memory.value
                part = namespace(value).read(value, start, stop) if _is_vector(value) else value
                parameters.setdefault(slot.name, {})[memory.name] = part
    return parameters


def write_state(buckets: Sequence[Filled], parameters: dict[str, dict[str, Any]]) -> None:
    """Load the result of `read_state` for the same parameters.

    Raises:
        ValueError: other parameters, sizes or fields; then nothing has changed.
    """
    mine = read_state(buckets)
    if _sizes(parameters) != _sizes(mine):
        raise ValueError(
            f"got error-feedback state of {len(parameters)} parameters whose names, sizes or kinds "
            f"differ from the {len(mine)} here; load it into the same model with the same "
            "compression and exchange (the same network, if exchange='auto' was given one)"
        )
    for bucket in buckets:
        for memory in list(_entries(bucket)):
            parts = [
                (start, parameters[slot.name][memory.name])
                for slot, start, _ in memory.places(bucket.slots)
            ]
            if _is_vector(memory.value):
                for start, part in parts:
                    namespace(memory.value).write(memory.value, start, part)
            elif parts:
                memory.put(parts[0][1])


def move_state(before: Sequence[Filled], after: Sequence[Filled]) -> None:
    """Take over the state of all parameters that keep some in `after`."""
    saved = read_state(before)
    write_state(after, {name: saved[name] for name in read_state(after)})


def keeps_state(buckets: Sequence[Filled]) -> bool:
    """Whether any channel keeps error-feedback state between steps."""
    return any(True for bucket in buckets for _ in _entries(bucket))


class _Entry(NamedTuple):
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


def _entries(bucket: Filled) -> Iterator[_Entry]:
    """The error-feedback state of a bucket's channel."""
    for piece in bucket.channel.pieces():
        for half in ("worker", "server"):
            held = getattr(piece.channel, half)
            for field, value in held._asdict().items() if held is not None else ():
                if value is None or field in piece.channel.method.scratch:
                    continue
                if isinstance(value, tuple):
                    for i, part in enumerate(value):
                        yield _Entry(piece, half, f"{field}.{i}", part)
                else:
                    yield _Entry(piece, half, field, value)


def _facts(method: Method, transport: Transport) -> dict[str, Any]:
    return {"compression": repr(method), "rank": transport.rank, "size": transport.size}


def _texts(methods: dict[str, Method]) -> dict[str, str]:
    return {name: repr(method) for name, method in methods.items()}


def _is_vector(value: Any) -> bool:
    return hasattr(value, "shape")


def _sizes(parameters: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: {field: len(v) if _is_vector(v) else None for field, v in fields.items()}
        for name, fields in parameters.items()
    }
