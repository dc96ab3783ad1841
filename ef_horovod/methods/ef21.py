"""EF21: every worker tracks its gradient by a compressed difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ef_horovod.arrays import Array, namespace
from ef_horovod.compressors.base import DEFAULT_KEY, Compressor, Payload
from ef_horovod.keys import Key
from ef_horovod.methods.base import Method
from ef_horovod.registry import register_method


class EF21State(NamedTuple):
    """A worker's tracked gradient and, with momentum, its moving average."""

    tracked: Array  # float32[d], h_i: exactly what all other ranks believe of this worker
    velocity: Array | None = None  # float32[d], v_i
    next_velocity: Array | None = None  # float32[d], becomes v_i when the step commits
    started: bool = False  # whether velocity holds a gradient yet
    pending: Payload | None = None  # sent, not yet added to tracked


class EF21Server(NamedTuple):
    """The replicated aggregate."""

    total: Array  # float32[d], sum_i h_i: a sum, so that it equals the workers' h_i to the last bit
    mean: Array  # float32[d]


@register_method
@dataclass(frozen=True)
class EF21(Method):
    """c_i = C(g_i - h_i); h_i += c_i; direction = H = mean_i h_i, kept as H += mean_i c_i.

    h_i starts at zero, so the first message is C(g_i), as in the paper. The state is in gradient
    units and free of the learning rate. With `momentum` = eta in (0, 1], the worker compresses the
    difference to v_i = (1 - eta) v_i + eta g_i instead (EF21-SGDM), which takes the noise of small
    batches out of what is tracked; v_i starts at the first gradient. eta = 1 is EF21-SGD.

    Memory: h_i, their sum and mean; with momentum two vectors more.

    Args:
        compressor: a contraction (`TopK`, `OneBit`, unscaled `RandomK`, `Cast`).
        momentum: eta, or None for plain EF21; smaller averages longer.

    Raises:
        ValueError: momentum outside (0, 1], or a compressor that is not a contraction.

    Example:
        >>> import ef_horovod as ef
        >>> ef.EF21(ef.TopK(ratio=0.01), momentum=0.1)
        EF21(compressor=TopK(ratio=0.01, k=None), momentum=0.1)

    References:
        Richtarik, Sokolov, Fatkhullin: EF21 (NeurIPS 2021), Algorithm 2. Fatkhullin et al.: EF21
        with Bells & Whistles (2021), EF21-SGD. Fatkhullin, Tyurin, Richtarik: Momentum Provably
        Improves Error Feedback (NeurIPS 2023), Algorithm 1.
    """

    momentum: float | None = None
    scratch: ClassVar[frozenset[str]] = frozenset({"mean", "next_velocity", "pending"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum is not None and not 0 < self.momentum <= 1:
            raise ValueError(
                f"EF21 got momentum={self.momentum}, expected the weight of the new gradient in "
                "(0, 1]; 0.1 averages over about ten steps"
            )
        if self.compressor.contraction(1000) is None:
            raise ValueError(
                f"EF21 got {self.compressor}, expected a contraction, for without one h_i diverges;"
                " take TopK, OneBit or RandomK(scale='contractive')"
            )

    @classmethod
    def examples(cls, compressor: Compressor) -> tuple[Method, ...]:
        if compressor.contraction(1000) is None:
            return ()
        return cls(compressor), cls(compressor, momentum=0.3)

    def init(self, x: Array) -> tuple[EF21State, EF21Server]:
        xp, d, device = namespace(x), x.shape[0], getattr(x, "device", None)
        state = EF21State(tracked=xp.zeros(d, device))
        if self.momentum is not None:
            state = state._replace(velocity=xp.zeros(d, device), next_velocity=xp.zeros(d, device))
        return state, EF21Server(total=xp.zeros(d, device), mean=xp.zeros(d, device))

    def push(
        self, state: EF21State, gradient: Array, key: Key = DEFAULT_KEY
    ) -> tuple[Payload, EF21State]:
        xp = namespace(gradient)
        if self.momentum is not None:
            if state.started:
                xp.average(state.velocity, gradient, self.momentum, out=state.next_velocity)
            else:
                xp.assign(state.next_velocity, gradient)
            xp.assign(gradient, state.next_velocity)
        xp.add(gradient, state.tracked, -1.0)
        message, _ = self.compressor.squeeze(gradient, key)
        return message, state._replace(pending=message)

    def reduce(
        self, server: EF21Server, messages: Sequence[Payload], key: Key
    ) -> tuple[Array, EF21Server]:
        for message in messages:
            message.add_to(server.total)
        namespace(server.total).divide(server.total, key.workers, out=server.mean)
        return server.mean, server

    def pull(self, state: EF21State, aggregate: Array) -> tuple[Array, EF21State]:
        assert state.pending is not None
        state.pending.add_to(state.tracked)
        return aggregate, EF21State(
            tracked=state.tracked,
            velocity=state.next_velocity,
            next_velocity=state.velocity,
            started=True,
        )
