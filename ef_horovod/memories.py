"""Error memories as a state dict: by parameter name, for one rank, whatever the buckets are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ef_horovod.arrays import namespace
from ef_horovod.buckets import Slot
from ef_horovod.channel import Channel
from ef_horovod.transports.base import Transport


class Filled(Protocol):
    """What has memories: a channel and what lies where in its vectors."""

    channel: Channel
    slots: list[Slot]


def save_state(
    buckets: Sequence[Filled], step: int, compression: str, transport: Transport
) -> dict[str, Any]:
    """One rank's memories and what they belong to."""
    facts = {"compression": compression, "rank": transport.rank, "size": transport.size}
    return {**facts, "step": step, "parameters": save_memories(buckets)}


def load_state(
    state: dict[str, Any], buckets: Sequence[Filled], compression: str, transport: Transport
) -> int:
    """Take over what `save_state` returned on this rank of an equal job; its step.

    Raises:
        ValueError: another rank, number of ranks, method or model; nothing was changed then.
        UnsupportedError: there are servers, and the first step has begun.
    """
    transport.require_not_begun()
    facts = {"compression": compression, "rank": transport.rank, "size": transport.size}
    for fact, expected in facts.items():
        if state.get(fact) != expected:
            raise ValueError(
                f"got a compression state of {fact} {state.get(fact)!r}, expected {expected!r}; "
                "load each rank's own file into an equal job, or start without it"
            )
    load_memories(buckets, state["parameters"])
    return int(state["step"])


def save_memories(buckets: Sequence[Filled]) -> dict[str, dict[str, Any]]:
    """{parameter name: {"worker.error": array, ...}}; arrays are copies."""
    parameters: dict[str, dict[str, Any]] = {}
    for bucket in buckets:
        for half, field, value in _memories(bucket):
            for slot in bucket.slots:
                part = value
                if _is_vector(value):
                    part = namespace(value).read(value, *_span(bucket, field, slot))
                parameters.setdefault(slot.name, {})[f"{half}.{field}"] = part
    return parameters


def load_memories(buckets: Sequence[Filled], parameters: dict[str, dict[str, Any]]) -> None:
    """Take over what `save_memories` returned for the same parameters.

    Raises:
        ValueError: other parameters, sizes or memories; nothing was changed then.
    """
    mine = save_memories(buckets)
    if _sizes(parameters) != _sizes(mine):
        raise ValueError(
            f"got memories of {len(parameters)} parameters whose names, sizes or kinds differ from "
            f"the {len(mine)} here; load them into the same model with the same compression"
        )
    for bucket in buckets:
        for half, field, value in list(_memories(bucket)):
            parts = [parameters[slot.name][f"{half}.{field}"] for slot in bucket.slots]
            if _is_vector(value):
                for slot, part in zip(bucket.slots, parts, strict=True):
                    namespace(value).write(value, _span(bucket, field, slot)[0], part)
            else:
                held = getattr(bucket.channel, half)
                setattr(bucket.channel, half, held._replace(**{field: parts[0]}))


def _memories(bucket: Filled) -> Iterator[tuple[str, str, Any]]:
    """(half, field, value) of all that a bucket's channel remembers between steps."""
    channel = bucket.channel
    for half in ("worker", "server"):
        held = getattr(channel, half)
        for field, value in held._asdict().items() if held is not None else ():
            if value is None or field in channel.method.scratch:
                continue
            if isinstance(value, tuple):
                yield from ((half, f"{field}.{i}", part) for i, part in enumerate(value))
            else:
                yield half, field, value


def _span(bucket: Filled, field: str, slot: Slot) -> tuple[int, int]:
    """Where in a vector a parameter's own part lies."""
    channel = bucket.channel
    return channel.method.span(field, slot.start, slot.stop, channel.gradient.shape[0])


def _is_vector(value: Any) -> bool:
    return hasattr(value, "shape")


def _sizes(parameters: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: {field: len(v) if _is_vector(v) else None for field, v in fields.items()}
        for name, fields in parameters.items()
    }
