"""Workers with one aggregator in this process, for the tests of methods."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

import ef_horovod as ef
from ef_horovod import registry
from ef_horovod.channel import Channel, finish_step
from ef_horovod.keys import tensor_id
from ef_horovod.transports.local import local_group

D = 500
COMPRESSORS = [example for cls in registry.COMPRESSORS.values() for example in cls.examples()]
METHODS = [m for cls in registry.METHODS.values() for c in COMPRESSORS for m in cls.examples(c)]
CONTRACTIONS = [c for c in COMPRESSORS if c.contraction(D) is not None]
DETERMINISTIC = [c for c in CONTRACTIONS if isinstance(c, (ef.Identity, ef.TopK, ef.OneBit))]


class FixedMask(ef.RandomK):
    """The same entries in every step: deterministic, additive and homogeneous, which Top-k is not.

    It borrows RandomK's messages, and draws from one key for ever.
    """

    def encode(self, x, key, *, residual):
        return super().encode(x, ef.Key(), residual=residual)


class Workers:
    """`count` workers with one aggregator, as a gather exchange runs them.

    The directions of all workers are required to be equal to the last bit.
    """

    def __init__(self, method, count=1, zeros=None, *, d=D, name=""):
        self.method, self.count, self.d = method, count, d
        self.tensor = tensor_id(name) if name else 0
        inits = [method.init((zeros or float32_zeros)(d), count) for _ in range(count)]
        self.states, self.server = [worker for worker, _ in inits], inits[0][1]

    def key(self, t, rank=0):
        return ef.Key(1, t, self.tensor, rank, self.count)

    def step(self, gradients, t=0):
        """Messages and the direction (a copy) after a step from one gradient for each worker."""
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
        assert len({direction.tobytes() for direction in directions}) == 1
        return messages, directions[0]

    def run(self, gradients):
        """Directions, float32[steps, d], for gradients of float32[steps, count, d]."""
        return np.array([self.step(g, t)[1] for t, g in enumerate(gradients)])

    def mean(self, field):
        """float64[d]: the mean over workers of an array that their states hold."""
        return np.mean([getattr(state, field) for state in self.states], axis=0, dtype=np.float64)


class Quadratics(NamedTuple):
    """f_i(x) = x' A_i x / 2 - b_i' x for n workers, strongly convex on average."""

    A: np.ndarray  # float64[n, d, d], positive semi-definite
    b: np.ndarray  # float64[n, d]

    @classmethod
    def draw(cls, n=5, d=20, *, spread=1.0, seed=0):
        """`spread`: by how much L_i differ."""
        rng = np.random.default_rng(seed)
        roots = rng.normal(size=(n, d, d)) * np.exp(spread * rng.normal(size=(n, 1, 1)))
        A = roots @ roots.transpose(0, 2, 1) / d + 0.1 * np.eye(d)
        return cls(A, rng.normal(size=(n, d)))

    @property
    def L_i(self):
        return np.array([np.linalg.eigvalsh(a)[-1] for a in self.A])

    @property
    def L(self):
        return np.linalg.eigvalsh(self.A.mean(0))[-1]

    @property
    def mu(self):
        return np.linalg.eigvalsh(self.A.mean(0))[0]

    def gradients(self, x):
        """float64[n, d]."""
        return self.A @ x - self.b

    def gap(self, x):
        """f(x) - min f."""
        optimum = np.linalg.solve(self.A.mean(0), self.b.mean(0))
        return float((x - optimum) @ self.A.mean(0) @ (x - optimum) / 2)


def float32_zeros(d):
    return np.zeros(d, np.float32)


def gradients(workers, steps, *, integers=False, seed=0, d=D):
    """float32[steps, workers, d]: correlated over steps, as gradients are."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(1, workers, d)) * np.exp(rng.normal(size=d))
    g = base + 0.5 * rng.normal(size=(steps, workers, d))
    return np.rint(8 * g).astype(np.float32) if integers else g.astype(np.float32)


def host(x):
    return x.numpy() if isinstance(x, torch.Tensor) else x


def memory(method, state):
    """What a state remembers between steps: bytes of its vectors, and its numbers, by name."""
    held = {}
    for name, value in state._asdict().items():
        if name in method.scratch or value is None:
            continue
        parts = value if isinstance(value, tuple) else (value,)
        for i, part in enumerate(parts):
            held[f"{name}.{i}"] = host(part).tobytes() if hasattr(part, "shape") else part
    return held


def channels(method, count, like=None, exchange="auto"):
    """A channel named "weights" on each of `count` ranks."""
    like = float32_zeros(D) if like is None else like
    return [
        Channel("weights", like, method, transport, exchange=exchange, seed=1)
        for transport in local_group(count, timeout=5)
    ]


def run_channels(group, gradients, step):
    """One step of all ranks in this thread; their directions, copied, or None if dropped."""
    for channel, g in zip(group, gradients, strict=True):
        channel.gradient[:] = torch.from_numpy(g) if torch.is_tensor(channel.gradient) else g
        channel.start(step)
    finished = [finish_step([channel]) for channel in group]
    return [None if parts is None else host(parts[0]).copy() for parts in finished]
