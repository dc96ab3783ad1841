"""Checks that a method sends the same bytes in all frameworks.

All frameworks run the same sequence of gradients through the users' code: the channel for NumPy and
torch, the adapter's ops for TensorFlow. The other ranks send the same data as rank 0, so that the
received data is tested too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ef_horovod import wire
from ef_horovod.arrays import Array, namespace
from ef_horovod.exchange.channel import Channel, finish_step
from ef_horovod.methods.base import Method
from ef_horovod.testing.echo import EchoTransport
from ef_horovod.testing.tools import array_of, bits, require
from ef_horovod.training.buckets import BucketPlan, Slot, one_slot
from ef_horovod.training.state import read_state
from ef_horovod.transports.base import Measure

SHAPE, STEPS, RANKS, NAME = (28, 25), 50, 3, "0.weights"
LENGTH = SHAPE[0] * SHAPE[1]

Facts = dict[str, Any]  # "sent", "directions", "state": sent data, results and states, as bytes


@dataclass
class OneChannel:
    """A bucket of one channel, for `read_state`."""

    channel: Channel
    slots: list[Slot]


class Recorder(EchoTransport):
    """Records the sent bytes."""

    def __init__(self) -> None:
        super().__init__(RANKS)
        self.sent: list[bytes] = []

    def allgather(
        self, name: str, data: np.ndarray, measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        self.sent.append(data.tobytes())
        return super().allgather(name, data, measure)

    def allreduce(self, name: str, values: Array) -> Callable[[], Array]:
        self.sent.append(bits(values))
        return super().allreduce(name, values)


def check_frameworks(method: Method, frameworks: Sequence[str]) -> None:
    """All frameworks send the same bytes as NumPy, and end with the same error-feedback state."""
    expected = by_channel(method)
    require_messages(method, expected["sent"])
    for framework in frameworks:
        for way, facts in _ways(method, framework).items():
            for what, of_numpy in expected.items():
                same = facts[what] == of_numpy
                require(same, method, f"has other {what} with {way} than with NumPy")


def _ways(method: Method, framework: str) -> dict[str, Facts]:
    """The results of a framework, by the way in which users run it."""
    if framework != "tensorflow":
        return {framework: by_channel(method, framework)}
    in_graphs = importlib.import_module("ef_horovod.testing.frameworks_tensorflow")
    tf = importlib.import_module("tensorflow")
    return {
        "eager TensorFlow": in_graphs.by_ops(method),
        "tf.function": in_graphs.by_ops(method, tf.function),
    }


def require_messages(method: Method, sent: list[bytes]) -> None:
    """Raise unless the payloads differ between steps; else there is nothing to compare."""
    said = [data for data in sent if not _says_nothing(data)]
    told = len(set(said)) == len(said) > STEPS // 4
    require(told, method, "sends the same in several steps, though its gradients differ")


def _says_nothing(data: bytes) -> bool:
    """Whether this is the payload of a worker that does not take part in a step."""
    return len(data) == wire.HEADER_NBYTES and data[3] == wire.ABSENT


def gradient_sequence() -> np.ndarray:
    """float32[STEPS, LENGTH]: correlated over steps, of very different sizes."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=LENGTH) * np.exp(rng.normal(size=LENGTH))
    return (base + 0.5 * rng.normal(size=(STEPS, LENGTH))).astype(np.float32)


def by_channel(method: Method, framework: str = "numpy") -> Facts:
    """Steps with a channel of NumPy arrays or torch tensors."""
    like = array_of(framework, np.zeros(LENGTH, np.float32))
    slots = one_slot(NAME, like.reshape(SHAPE))  # a matrix, for methods that need shapes
    transport, directions = Recorder(), []
    channel = BucketPlan(NAME, slots, method).open(like, transport, seed=3)
    for step, gradient in enumerate(gradient_sequence()):
        namespace(like).assign(channel.gradient, array_of(framework, gradient))
        channel.start(step)
        finished = finish_step([channel])
        require(finished is not None, method, f"drops step {step}, whose gradients are finite")
        directions.append(bits(finished[0] if finished else like))
    return facts(transport.sent, directions, OneChannel(channel, slots))


def facts(sent: list[bytes], directions: list[bytes], bucket: Any) -> Facts:
    """Sent data, aggregated gradients and the final error-feedback state, all as bytes."""
    (state,) = read_state([bucket]).values() or ({},)
    return {
        "sent": sent,
        "directions": directions,
        "state": {field: _bytes(value) for field, value in state.items()},
    }


def _bytes(memory: Any) -> bytes:
    """The bytes of an array or a number."""
    return bits(memory) if hasattr(memory, "shape") else np.asarray(memory).tobytes()
