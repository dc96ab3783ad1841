"""One rank's error-feedback state as a state dict by parameter name, independent of buckets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ef_horovod.arrays import namespace
from ef_horovod.methods.base import Method
from ef_horovod.training.buckets import own_methods
from ef_horovod.training.entries import Filled, entries
from ef_horovod.training.merging import split
from ef_horovod.transports.base import Transport


def save_state(
    buckets: Sequence[Filled], step: int, method: Method, transport: Transport
) -> dict[str, Any]:
    """One rank's error-feedback state, with the facts that identify the job."""
    facts, methods = _facts(method, transport), _texts(own_methods(buckets, method))
    return {**facts, "methods": methods, "step": step, "parameters": read_state(buckets)}


def load_state(
    state: dict[str, Any], buckets: Sequence[Filled], method: Method, transport: Transport
) -> int:
    """Load the result of `save_state`, or a merged state; returns its step.

    Raises:
        ValueError: another method or model; or, unless it is merged, another rank or number of
            ranks. Then nothing has changed.
        UnsupportedError: there are servers, and the first step has begun.
    """
    transport.require_not_begun()
    facts = _facts(method, transport)
    for fact, expected in facts.items():
        if state.get(fact) != expected and not (is_merged(state) and fact in ("rank", "size")):
            raise ValueError(
                f"got a compression state of {fact} {state.get(fact)!r}, expected {expected!r}; "
                "load each rank's own file into an equal job, take a file of ef.save, which fits "
                "any number of ranks, or start without it"
            )
    mine, theirs = _texts(own_methods(buckets, method)), state.get("methods", {})
    for name in sorted(mine.keys() | theirs.keys()):
        found, wanted = theirs.get(name, repr(method)), mine.get(name, repr(method))
        if found != wanted:
            raise ValueError(
                f"got a compression state of '{name}' by {found}, expected one by {wanted}; pass "
                "the dense= of the job that saved it, or start without the state"
            )
    (split if is_merged(state) else write_state)(buckets, state["parameters"])
    return int(state["step"])


def merged_facts(
    buckets: Sequence[Filled], step: int, method: Method, transport: Transport
) -> dict[str, Any]:
    """The facts that identify the job of a merged state."""
    return {
        "merged": True,
        "compression": repr(method),
        "methods": _texts(own_methods(buckets, method)),
        "step": step,
        "size": transport.size,
    }


def is_merged(state: dict[str, Any]) -> bool:
    """Whether a state is that of all ranks together."""
    return bool(state.get("merged"))


def read_state(buckets: Sequence[Filled]) -> dict[str, dict[str, Any]]:
    """{parameter name: {"worker.error": array, ...}}; arrays are copies."""
    parameters: dict[str, dict[str, Any]] = {}
    for bucket in buckets:
        for memory in entries(bucket):
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
        for memory in list(entries(bucket)):
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
    return any(True for bucket in buckets for _ in entries(bucket))


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
