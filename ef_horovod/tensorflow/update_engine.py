"""The engine of `ef.CompressedUpdates`: counts local steps, and keeps where they started from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from ef_horovod.exchange.stats import ChannelStats
from ef_horovod.tensorflow.engine import Engine
from ef_horovod.tensorflow.graphs import python_op, refuse_replicas, refuse_xla
from ef_horovod.tensorflow.options import Options
from ef_horovod.tensorflow.server_transport import GraphTransport
from ef_horovod.tensorflow.variables import native
from ef_horovod.training.updates import count_local_steps, local_part, require_exchanged


class UpdateEngine(Engine):
    """An engine whose gradients are the changes that local steps made to variables.

    Args:
        named, options, transport: as of `Engine`.
        local_steps: steps per exchange.
    """

    def __init__(
        self,
        named: list[tuple[str, Any]],
        options: Options,
        transport: GraphTransport,
        local_steps: int,
    ) -> None:
        super().__init__(named, options, transport)
        self.local_steps = local_steps
        self._left_out = 0  # steps since the last exchange, by this rank alone
        self._more = 0  # steps in all exchanges so far, beyond one for each
        self._counted: list[ChannelStats] = []  # counters after the last exchange
        self._starts: dict[int, tf.Variable] = {}  # by id of a variable: its value after it
        with tf.init_scope():
            self.since = tf.Variable(0, trainable=False, dtype=tf.int64, name="ef_since")

    def begin(self, variables: Sequence[Any]) -> None:
        """Make the buckets of these variables and compare the ranks, at the first step."""
        refuse_xla()
        refuse_replicas()
        if not self._opened:
            chosen = {id(variable) for variable in variables}
            self._begin([v if id(v) in chosen else None for v in self.followed])

    def keep(self) -> None:
        """Ops that keep the variables before the first step after an exchange."""
        pairs = [(self._starts[id(s.parameter)], native(s.parameter)) for s in self._slots()]

        def copy() -> tf.Tensor:
            for start, variable in pairs:
                start.assign(variable.read_value())
            return tf.constant(True)

        tf.cond(tf.equal(self.since.read_value(), 0), copy, lambda: tf.constant(False))

    def starts(self, variables: Sequence[Any]) -> list[tf.Tensor]:
        """The variables after the last exchange."""
        return [self._starts[id(variable)].read_value() for variable in variables]

    def count_exchange(self, good: tf.Tensor) -> tf.Tensor:
        """Ops after an exchange that count it as its local steps; they return `good`."""

        def count(steps: Any, good: Any) -> np.bool_:
            channels = self._channels()
            for channel, before in zip(channels, self._counted, strict=True):
                count_local_steps(channel.counters, before, int(steps), self._left_out)
            self._left_out = 0
            self._counted = [replace(channel.counters) for channel in channels]
            self._more += int(steps) - 1 if good else 0
            return np.bool_(good)

        counted = python_op(count, [self.since.read_value(), good], tf.bool)
        with tf.control_dependencies([counted]):
            self.since.assign(0)
        return tf.ensure_shape(counted, [])

    def count_left_out_here(self) -> None:
        """Ops that count a step that this rank alone left out."""

        def count() -> np.bool_:
            self.count_left_out()
            self._left_out += 1
            return np.bool_(True)

        python_op(count, [], tf.bool)

    def steps_since(self) -> int:
        """Steps since the last exchange, those of a state that the first step will load too."""
        return int(_local(self._loaded).get("since", self.since))

    def due(self) -> list[Any]:
        """The variables that these steps may have changed."""
        start = _local(self._loaded).get("start")
        names = [slot.name for slot in self._slots()] if start is None else start
        return [variable for name, variable in self._named if name in names]

    def steps_taken(self) -> int:
        """Of the optimizer, those before a loaded state included."""
        return self._committed() + int(self.since)

    def require_exchanged(self, what: str) -> None:
        """Raise between exchanges, when the ranks' variables differ."""
        require_exchanged(what, self.steps_since(), self.local_steps)

    def state_dict(self) -> dict[str, Any]:
        """See `StepDriver.state_dict`; between exchanges with the variables of the last one."""
        since = int(self.since)
        slots = self._slots() if since else []
        start = {slot.name: _array(self._starts[id(slot.parameter)]) for slot in slots}
        local = {"committed": self._committed(), "since": since, "start": start}
        return super().state_dict() | {"local": local}

    def describe_merged(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """See `StepDriver.describe_merged`."""
        return super().describe_merged(parameters) | {"local": {"committed": self._committed()}}

    def merged_state_dict(self) -> dict[str, Any]:
        """See `Engine.merged_state_dict`; not between exchanges."""
        self.require_exchanged("the state for any number of ranks")
        return super().merged_state_dict()

    def forget(self) -> None:
        """See `Engine.forget`; local steps since the last exchange are forgotten too."""
        super().forget()
        self.since.assign(0)
        if self._loaded is not None:
            local = {"committed": _local(self._loaded).get("committed", self._loaded["step"])}
            self._loaded = {**self._loaded, "local": local}

    def _committed(self) -> int:
        """Steps in all exchanges so far."""
        return self._steps_done() + self._more

    def _open(self) -> None:
        super()._open()
        self._counted = [replace(channel.counters) for channel in self._channels()]
        self._more = 0
        self.since.assign(0)
        for slot in self._slots() if self.local_steps > 1 else []:
            if id(slot.parameter) not in self._starts:
                zeros = tf.zeros(slot.parameter.shape, native(slot.parameter).dtype)
                self._starts[id(slot.parameter)] = tf.Variable(zeros, trainable=False)

    def _load_now(self, state: dict[str, Any]) -> None:
        self._require_own(state)
        shapes = {slot.name: tuple(slot.parameter.shape) for slot in self._slots()}
        local = local_part(state, shapes, self.local_steps)
        super()._load_now(state)
        done = self._steps_done()
        self._more = 0 if local.committed is None else local.committed - done
        self.since.assign(local.since)
        for slot in self._slots() if local.since else []:
            kept = self._starts[id(slot.parameter)]
            kept.assign(tf.cast(local.start[slot.name], kept.dtype))

    def _facts(self) -> list[str]:
        options, *others = super()._facts()
        local = f"local_steps={self.local_steps} ({int(self.since)} since an exchange)"
        return [f"{options}, {local}", *others]


def _local(state: dict[str, Any] | None) -> dict[str, Any]:
    """The part of a state about local steps; empty in states of gradients and old ones."""
    return {} if state is None else state.get("local", {})


def _array(variable: tf.Variable) -> np.ndarray:
    """Its value in a type that files can hold, without rounding."""
    value = variable.read_value()
    return np.asarray(tf.cast(value, tf.float32) if value.dtype == tf.bfloat16 else value)
