"""Workers with one aggregator in this process, for checks and tests of methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key, tensor_id
from ef_horovod.compressors.base import Payload
from ef_horovod.exchange.channel import Channel, conclude, settle
from ef_horovod.methods.base import Method
from ef_horovod.testing.tools import array_of, bits, framework_of, host
from ef_horovod.training.choice import open_channel
from ef_horovod.transports.local import local_group

D = 500


def float32_zeros(d: int) -> np.ndarray:
    """float32[d] of zeros."""
    return np.zeros(d, np.float32)


def gradients(
    workers: int, steps: int, *, integers: bool = False, seed: int = 0, d: int = D
) -> np.ndarray:
    """float32[steps, workers, d], correlated over steps like real gradients."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(1, workers, d)) * np.exp(rng.normal(size=d))
    g = base + 0.5 * rng.normal(size=(steps, workers, d))
    return np.rint(8 * g).astype(np.float32) if integers else g.astype(np.float32)


class Workers:
    """`count` workers with one aggregator, as in a gather exchange.

    The aggregated gradients of all workers must be bitwise equal.

    Args:
        method: error-feedback method.
        count: number of workers.
        zeros: returns a float32[d] of zeros in the framework to use; default NumPy.
        d: length of the vectors.
        name: of the vector, for the keys of random compressors.

    Example:
        >>> import ef_horovod as ef
        >>> messages, direction = Workers(ef.EF21(ef.TopK(k=3)), 2).step(gradients(2, 1)[0])
        >>> len(messages), direction.shape
        (2, (500,))
    """

    def __init__(
        self,
        method: Method,
        count: int = 1,
        zeros: Callable[[int], Array] | None = None,
        *,
        d: int = D,
        name: str = "",
    ) -> None:
        self.method, self.count, self.d = method, count, d
        self.tensor = tensor_id(name) if name else 0
        inits = [method.init((zeros or float32_zeros)(d), count) for _ in range(count)]
        self.states: list[Any] = [worker for worker, _ in inits]
        self.server: Any = inits[0][1]

    def key(self, t: int, rank: int = 0) -> Key:
        """The key of a worker in a step."""
        return Key(1, t, self.tensor, rank, self.count)

    def step(self, gradients: Sequence[Array], t: int = 0) -> tuple[list[Payload], np.ndarray]:
        """One step with one gradient per worker; payloads and a copy of the aggregated gradient."""
        own = [g * 1 for g in gradients]
        pushed = [
            self.method.push(state, g, self.key(t, i))
            for i, (state, g) in enumerate(zip(self.states, own, strict=True))
        ]
        messages = [message for message, _ in pushed]
        aggregate, self.server = self.method.reduce(self.server, messages, self.key(t).of_server())
        pulled = [self.method.pull(state, aggregate) for _, state in pushed]
        self.states = [state for _, state in pulled]
        directions = [host(direction).copy() for direction, _ in pulled]
        if len({direction.tobytes() for direction in directions}) != 1:
            raise AssertionError(f"{self.method!r} gives workers different directions in step {t}")
        return messages, directions[0]

    def run(self, gradients: Sequence[Sequence[Array]]) -> np.ndarray:
        """Aggregated gradients, float32[steps, d], for gradients float32[steps, count, d]."""
        return np.array([self.step(g, t)[1] for t, g in enumerate(gradients)])

    def mean(self, field: str) -> np.ndarray:
        """float64[d]: the mean over workers of an array in their states."""
        parts = [np.asarray(getattr(state, field), np.float64) for state in self.states]
        return np.asarray(np.mean(parts, axis=0))


def memory(method: Method, state: Any) -> dict[str, Any]:
    """The error-feedback state kept between steps, by name: bytes of vectors, and numbers."""
    held = {}
    for name, value in state._asdict().items():
        if name in method.scratch or value is None:
            continue
        parts = value if isinstance(value, tuple) else (value,)
        for i, part in enumerate(parts):
            held[f"{name}.{i}"] = bits(part) if hasattr(part, "shape") else part
    return held


def channels(
    method: Method,
    count: int,
    like: Array = None,
    exchange: str = "auto",
    dense_steps: int = 0,
) -> list[Channel]:
    """One channel of float32[D], named "weights", for each of `count` ranks."""
    like = float32_zeros(D) if like is None else like
    return [
        open_channel(
            "weights", like, method, end, exchange=exchange, seed=1, dense_steps=dense_steps
        )
        for end in local_group(count, timeout=5)
    ]


def run_channels(
    group: Sequence[Channel],
    gradients: Sequence[np.ndarray],
    step: int,
    *,
    undoable: bool = False,
) -> list[np.ndarray | None]:
    """One step of all ranks in this thread; copies of the aggregated gradients, None if dropped."""
    for channel, g in zip(group, gradients, strict=True):
        framework = framework_of(channel.gradient)
        namespace(channel.gradient).assign(channel.gradient, array_of(framework, g))
        channel.start(step)
    good = [settle([channel], undoable=undoable) for channel in group]
    finished = [conclude([channel], good=fine) for channel, fine in zip(group, good, strict=True)]
    return [None if parts is None else host(parts[0]).copy() for parts in finished]
