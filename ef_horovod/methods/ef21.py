"""EF21: every worker tracks its gradient by compressed differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.common.options import keep, keep_number, number
from ef_horovod.compressors.base import DEFAULT_KEY, Compressor, Payload
from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method, vector_like
from ef_horovod.methods.merging import Merge
from ef_horovod.methods.participation import participates
from ef_horovod.methods.registry import register_method
from ef_horovod.methods.server_compressor import require_server_compressor


class EF21State(NamedTuple):
    """A worker's tracked gradient."""

    tracked: Array  # float32[d], h_i: bitwise as all other ranks track it
    velocity: Array | None = None  # float32[d], v_i, with momentum
    next_velocity: Array | None = None  # float32[d], becomes v_i when the step commits
    started: bool = False  # whether velocity holds a gradient yet
    estimate: Array | None = None  # float32[d], with `server_compressor`: G, the sum of all answers
    pending: Payload | None = None  # sent, not yet added to tracked


class EF21Server(NamedTuple):
    """The aggregator's state."""

    total: Array  # float32[d], sum_i h_i: a sum, so that it equals the workers' h_i to the last bit
    mean: Array  # float32[d]
    estimate: Array | None = (
        None  # float32[d], with `server_compressor`: G, the workers' copy of the mean
    )


@register_method
@dataclass(frozen=True)
class EF21(Method):
    """c_i = C(g_i - h_i); h_i += c_i; direction = H = mean_i h_i, kept as H += mean_i c_i.

    h_i starts at zero, so the first payload is C(g_i), as in the paper. The state is in gradient
    units and independent of the learning rate. Variants:

    - Full gradients: EF21. Gradients of a batch: EF21-SGD. The estimates of `PAGE`: EF21-PAGE.
    - `momentum` = eta in (0, 1]: the worker compresses the difference to
      v_i = (1 - eta) v_i + eta g_i (EF21-SGDM). This removes the noise of small batches from the
      tracked gradient. v_i starts at the first gradient. eta = 1 is EF21-SGD.
    - `participation` = p in (0, 1]: in each step only max(1, floor(p n)) workers send. All ranks
      draw the same ones. The others keep h_i and v_i, and send a header (EF21-PP). Their gradient
      is not used in that step, so it drops no step if it is not finite.
    - `server_compressor` = C_down: the aggregator answers b = C_down(H - G), G += b, and the
      aggregated gradient is G (EF21-BC).
    - `weights` = smoothness constants L_i, one per worker: w_i = L_i / sum_j L_j, and
      c_i = C(g_i / (n w_i) - h_i), H = sum_i w_i h_i (EF21-W).

    Use the optimizer for Polyak's momentum (EF21-HB) and proximal steps (EF21-Prox): SGD with
    momentum on H is EF21-HB.

    State: h_i, their sum and mean; two vectors more with momentum, two more with
    `server_compressor`.

    Args:
        compressor: a contraction (`TopK`, `OneBit`, unscaled `RandomK`, `Cast`).
        momentum: eta, or None; smaller averages longer.
        participation: share of the workers that send per step, or None for all.
        server_compressor: the aggregator's compressor, a contraction, or None.
        weights: positive numbers, one per worker in rank order, or None for equal ones.

    Raises:
        ValueError: a number out of range, or a compressor that is not a contraction.
        UnsupportedError: `server_compressor` is not a compressor; at the first step, if there
            are not n weights.

    Example:
        >>> import ef_horovod as ef
        >>> ef.EF21(ef.TopK(ratio=0.01), momentum=0.1).momentum
        0.1

    References:
        Richtarik, Sokolov, Fatkhullin: EF21 (NeurIPS 2021), Algorithm 2. Fatkhullin et al.: EF21
        with Bells & Whistles (2021), Table 2: EF21-SGD, EF21-PP, EF21-BC. Fatkhullin, Tyurin,
        Richtarik: Momentum Provably Improves Error Feedback (NeurIPS 2023), Algorithm 1. Richtarik,
        Gasanov, Burlachenko: Error Feedback Reloaded (ICLR 2024): EF21-W.
    """

    momentum: float | None = None
    participation: float | None = None
    server_compressor: Compressor | None = None
    weights: tuple[float, ...] | None = None
    scratch: ClassVar[frozenset[str]] = frozenset({"mean", "next_velocity", "pending"})
    pulled_in_place: ClassVar[frozenset[str]] = frozenset({"tracked", "estimate"})
    merging: ClassVar[Mapping[str, Merge]] = {
        "worker.tracked": Merge.MEAN,
        "worker.velocity": Merge.MEAN,
        "worker.started": Merge.SHARED,
        "worker.estimate": Merge.SHARED,
        "server.total": Merge.SUM,
        "server.estimate": Merge.SHARED,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        what, way_out = "the weight of the new gradient", "0.1 averages over about ten steps"
        keep_number(self, "momentum", "(0, 1]", way_out, what, optional=True)
        require_server_compressor(self)
        for compressor in (self.compressor, self.server_compressor):
            if compressor is not None:
                require_contraction("EF21", compressor)
        what, way_out = "the share of workers that send in a step", "leave it out for all"
        keep_number(self, "participation", "(0, 1]", way_out, what, optional=True)
        if self.weights is not None:
            keep(self, "weights", _checked_weights(self.weights))

    @property
    def allreducible(self) -> bool:
        """Weighted or missing payloads cannot be summed in flight."""
        return super().allreducible and self.weights is None and self.participation is None

    @property
    def fixed_size(self) -> bool:
        """A worker that does not take part sends only a header."""
        return super().fixed_size and self.participation is None

    @classmethod
    def examples(cls, compressor: Compressor) -> tuple[Method, ...]:
        if not compressor.contracts:
            return ()
        return (
            cls(compressor),
            cls(compressor, momentum=0.3),
            cls(compressor, participation=0.5),
            cls(compressor, server_compressor=compressor),
        )

    def require_mergeable(self) -> None:
        super().require_mergeable()
        if self.weights is not None:
            raise UnsupportedError(
                f"got {self!r} for a job with another number of ranks, expected one without "
                "weights, which are those of the workers it has; save the state of each rank by "
                "compression_state_dict(), for a job with as many ranks"
            )

    def init(self, x: Array, workers: int = 1) -> tuple[EF21State, EF21Server]:
        if self.weights is not None and len(self.weights) != workers:
            raise UnsupportedError(
                f"EF21 got {len(self.weights)} weights for {workers} workers, expected one for "
                "each, in rank order"
            )
        state = EF21State(tracked=vector_like(x))
        server = EF21Server(total=vector_like(x), mean=vector_like(x))
        if self.momentum is not None:
            state = state._replace(velocity=vector_like(x), next_velocity=vector_like(x))
        if self.server_compressor is not None:
            state = state._replace(estimate=vector_like(x))
            server = server._replace(estimate=vector_like(x))
        return state, server

    def push(
        self, state: EF21State, gradient: Array, key: Key = DEFAULT_KEY
    ) -> tuple[Payload, EF21State]:
        if not participates(self.participation, key):
            message = self.compressor.absent(gradient)
            return message, state._replace(pending=message)
        xp = namespace(gradient)
        if self.weights is not None:
            xp.divide(gradient, key.workers * self._weight(key.rank), out=gradient)
        if self.momentum is not None:
            if state.started:
                xp.average(state.velocity, gradient, self.momentum, out=state.next_velocity)
            else:
                xp.assign(state.next_velocity, gradient)
            xp.assign(gradient, state.next_velocity)
        xp.add(gradient, state.tracked, -1.0)
        message, _ = self.compressor.compress_with_residual(gradient, key)
        return message, state._replace(pending=message)

    def reduce(
        self, server: EF21Server, messages: Sequence[Payload], key: Key
    ) -> tuple[Array | Payload, EF21Server]:
        xp = namespace(server.total)
        for rank, message in enumerate(messages):
            message.add_to(server.total, 1.0 if self.weights is None else self._weight(rank))
        divisor = key.workers if self.weights is None else 1
        xp.divide(server.total, divisor, out=server.mean)
        if self.server_compressor is None:
            return server.mean, server
        xp.add(server.mean, server.estimate, -1.0)
        answer, _ = self.server_compressor.compress_with_residual(server.mean, key)
        answer.add_to(server.estimate)
        return answer, server

    def pull(self, state: EF21State, aggregate: Array | Payload) -> tuple[Array, EF21State]:
        assert state.pending is not None
        state.pending.add_to(state.tracked)
        direction = self.listen(state, aggregate)
        if self.momentum is not None and not state.pending.is_absent:
            state = state._replace(
                velocity=state.next_velocity, next_velocity=state.velocity, started=True
            )
        return direction, state._replace(pending=None)

    def listen(self, state: EF21State, aggregate: Array | Payload) -> Array:
        if self.server_compressor is None:
            return aggregate
        aggregate.add_to(state.estimate)
        return state.estimate

    def _weight(self, rank: int) -> float:
        assert self.weights is not None
        return self.weights[rank] / sum(self.weights)


def _checked_weights(weights: Any) -> tuple[float, ...]:
    way_out = "give each worker's smoothness constant L_i, as in (1.0, 2.0)"
    if isinstance(weights, (str, bytes)) or not isinstance(weights, (Sequence, np.ndarray)):
        raise ValueError(f"EF21 got weights={weights!r}, expected one number a worker; {way_out}")
    named = ((f"weights[{i}]", weight) for i, weight in enumerate(weights))
    return tuple(float(number("EF21", name, w, "(0, inf)", way_out)) for name, w in named)


def require_contraction(method: str, compressor: Compressor) -> None:
    """Raise unless the compressor is a contraction; otherwise tracked gradients diverge.

    Raises:
        ValueError: the compressor is not a contraction.
    """
    weak = next((c for c in compressor.extremes if not c.contracts), None)
    if weak is not None:
        raise ValueError(
            f"{method} got {weak}, expected a contraction, because h_i diverges without "
            "one; take TopK, OneBit or RandomK(scale='contractive')"
        )
