"""EF21+: each step sends the more accurate of an EF21 update and a fresh C(g)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.compressors.base import DEFAULT_KEY, Compressor, Payload
from ef_horovod.methods.base import Method, vector_like
from ef_horovod.methods.ef21 import require_contraction
from ef_horovod.methods.merging import Merge
from ef_horovod.methods.registry import register_method


class EF21PlusState(NamedTuple):
    """A worker's tracked gradient."""

    tracked: Array  # float32[d], h_i
    afresh: Array  # float32[d], room for the gradient
    pending: Payload | None = None  # sent, not yet applied to tracked


class EF21PlusServer(NamedTuple):
    """The aggregator's copies of the tracked gradients."""

    tracked: tuple[Array, ...]  # n times float32[d]
    mean: Array  # float32[d]


@register_method
@dataclass(frozen=True)
class EF21Plus(Method):
    """b_i = C(g_i), m_i = h_i + C(g_i - h_i); h_i becomes the one nearer to g_i, m_i in a tie.

    The payload is C(g_i - h_i), or C(g_i) with a header flag to replace h_i. So the aggregator
    keeps every worker's h_i: n vectors, on every rank unless there is a server. The theory requires
    a deterministic C. Each step compresses twice.

    Args:
        compressor: a contraction.

    Raises:
        ValueError: the compressor is not a contraction.

    Example:
        >>> import ef_horovod as ef
        >>> ef.EF21Plus(ef.TopK(k=1))
        EF21Plus(TopK(k=1))

    References:
        Richtarik, Sokolov, Fatkhullin: EF21 (NeurIPS 2021), Algorithm 3 and Theorem 4.
    """

    scratch: ClassVar[frozenset[str]] = frozenset({"mean", "afresh", "pending"})
    pulled_in_place: ClassVar[frozenset[str]] = frozenset({"tracked"})
    merging: ClassVar[Mapping[str, Merge]] = {
        "worker.tracked": Merge.MEAN,
        "server.tracked": Merge.EACH,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_contraction("EF21Plus", self.compressor)

    @property
    def allreducible(self) -> bool:
        """No: a payload may replace h_i, so the aggregator needs each one."""
        return False

    @classmethod
    def examples(cls, compressor: Compressor) -> tuple[Method, ...]:
        return (cls(compressor),) if compressor.contracts else ()

    def init(self, x: Array, workers: int = 1) -> tuple[EF21PlusState, EF21PlusServer]:
        return (
            EF21PlusState(tracked=vector_like(x), afresh=vector_like(x)),
            EF21PlusServer(
                tracked=tuple(vector_like(x) for _ in range(workers)), mean=vector_like(x)
            ),
        )

    def push(
        self, state: EF21PlusState, gradient: Array, key: Key = DEFAULT_KEY
    ) -> tuple[Payload, EF21PlusState]:
        xp = namespace(gradient)
        xp.assign(state.afresh, gradient)
        xp.add(gradient, state.tracked, -1.0)
        difference, lost = self.compressor.compress_with_residual(gradient, key)
        replacement, lost_afresh = self.compressor.compress_with_residual(state.afresh, key)
        if xp.squared_norm(lost) <= xp.squared_norm(lost_afresh):
            return difference, state._replace(pending=difference)
        message = replacement.as_replacement()
        xp.assign(gradient, lost_afresh)  # `push` must leave the compression error
        return message, state._replace(pending=message)

    def reduce(
        self, server: EF21PlusServer, messages: Sequence[Payload], key: Key
    ) -> tuple[Array, EF21PlusServer]:
        xp = namespace(server.mean)
        xp.fill(server.mean, 0.0)
        for tracked, message in zip(server.tracked, messages, strict=True):
            _take_over(tracked, message)
            xp.add(server.mean, tracked)
        xp.divide(server.mean, key.workers, out=server.mean)
        return server.mean, server

    def pull(self, state: EF21PlusState, aggregate: Array) -> tuple[Array, EF21PlusState]:
        assert state.pending is not None
        _take_over(state.tracked, state.pending)
        return aggregate, state._replace(pending=None)

    def listen(self, state: EF21PlusState, aggregate: Array) -> Array:
        return aggregate


def _take_over(tracked: Array, message: Payload) -> None:
    if message.is_replacement:
        namespace(tracked).fill(tracked, 0.0)
    message.add_to(tracked)
