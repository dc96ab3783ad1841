"""Counts what a method really sends, whatever carries it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

import ef_horovod as ef
from ef_horovod.compressors.base import Payload


@dataclass
class Counts:
    """Sums over all steps and over the workers of this process.

    Attributes:
        messages: of the workers.
        up: bytes of the workers' messages, as they would travel to a server.
        down: bytes of a server's answers to them: payloads, or float32 numbers as they are.
        entries: kept entries of sparse messages.
        error: ||e||^2, for methods whose worker keeps an error.
    """

    messages: int = 0
    up: float = 0.0
    down: float = 0.0
    entries: float = 0.0
    error: float = 0.0


def counted(method: ef.Method, counts: Counts) -> ef.Method:
    """The same method, which adds to `counts` as it is used."""
    base = type(method)
    sparse = isinstance(method.compressor, ef.TopK | ef.HardThreshold)

    class Counted(base):  # type: ignore[misc, valid-type]
        def push(self, state: Any, gradient: Any, key: Any = None) -> Any:
            message, state = super().push(state, gradient, key)
            counts.messages += 1
            counts.up += message.nbytes
            if sparse and not message.is_absent:  # a body starts with uint32 k
                counts.entries += float(np.frombuffer(bytes(message)[16:20], "<u4")[0])
            if hasattr(state, "error"):
                error = state.error
                counts.error += float(np.dot(error, error))
            return message, state

        def pull(self, state: Any, aggregate: Any) -> Any:
            whole = not isinstance(aggregate, Payload)
            counts.down += 4 * aggregate.shape[0] if whole else aggregate.nbytes
            return super().pull(state, aggregate)

    Counted.__name__ = base.__name__
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    return Counted(**values)
