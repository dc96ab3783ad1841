"""ErrorCompensatedX: error feedback from the last two steps, for variance-reduced methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.common.options import keep_number
from ef_horovod.compressors.base import DEFAULT_KEY, Compressor, Payload
from ef_horovod.compressors.identity import Identity
from ef_horovod.methods.base import Method, vector_like
from ef_horovod.methods.error_feedback import require_no_amplifier
from ef_horovod.methods.merging import Merge
from ef_horovod.methods.registry import register_method
from ef_horovod.methods.schedules import Scheduled, keep_weight, value_at
from ef_horovod.methods.server_compressor import decoded, require_server_compressor


class ECXState(NamedTuple):
    """A worker's errors and its replica of the aggregated gradient."""

    last: Array  # float32[d], delta_{t-1}
    before: Array  # float32[d], delta_{t-2}
    direction: Array  # float32[d], v: the same on all ranks
    answer: Array  # float32[d], room for the aggregator's
    filtered: Array | None = None  # float32[d], e, with beta < 1
    next_filtered: Array | None = None  # float32[d], becomes e when the step commits
    alpha: float = 1.0  # of the current step


class ECXServer(NamedTuple):
    """The aggregator's errors."""

    last: Array
    before: Array
    mean: Array
    filtered: Array | None = None
    next_filtered: Array | None = None


@register_method
@dataclass(frozen=True)
class ErrorCompensatedX(Method):
    """v_t = (1 - alpha_t) v_{t-1} + alpha_t q_t, where q_t stands for mean_i A_i(x_t), compressed
    on both ways with the errors of two steps:

        Delta_t = (alpha_{t-1}/alpha_t)(2 - alpha_t) delta_{t-1}
                  - (alpha_{t-2}/alpha_t)(1 - alpha_t) delta_{t-2}
        e_t = (1 - beta) e_{t-1} + beta Delta_t;  w = A + e_t;  send C(w);  delta_t = w - C(w)

    at each worker, and at the aggregator with its own errors. A worker pushes A_i: the gradient for
    momentum, or the estimate of `STORM`, `ROOTSGD` or `IGT` for these methods. With beta = 1 the
    errors telescope: the sum of all v differs from its uncompressed value by alpha_t times one
    error. alpha = 1 is then DoubleSqueeze.

    2 - alpha exceeds 1, so with beta = 1 a weak compressor makes the errors grow without bound. A
    constant alpha and beta = 1 / (2 - alpha) give e_t = delta_{t-1}: ordinary error feedback.
    A smaller beta smooths more. Measured (docs/results/ecx.md):

    - Momentum (A is the gradient) with `OneBit` or half of the entries: beta = 1. With `OneBit` at
      large learning rates all smaller beta were unstable, including ordinary error feedback.
    - `STORM`, `IGT` and `ROOTSGD` with sparse payloads: 0.3, the default. At large learning rates
      it stays near the uncompressed method, where beta >= 0.5 and ordinary error feedback diverge.
    - These with `OneBit`: no beta did well at all learning rates; try a smaller one.

    State: on each worker two errors, the aggregated gradient and room for the answer; at the
    aggregator two errors; with beta < 1 two vectors more at both.

    Args:
        compressor: of the workers.
        server_compressor: of the aggregator; `Identity()` for none.
        alpha: weight of the new A in (0, 1]: a number, `Decay(2/3)` for STORM, `Decay(1)` for
            ROOT-SGD.
        beta: weight of Delta_t in (0, 1].

    Raises:
        ValueError: a number out of range, or a compressor that amplifies errors.
        UnsupportedError: `server_compressor` is not a compressor.

    Example:
        >>> import ef_horovod as ef
        >>> ef.ErrorCompensatedX(ef.OneBit(), server_compressor=ef.OneBit(), alpha=0.1).beta
        0.3

    References:
        Tang, Li, Liu, Yan: ErrorCompensatedX: error compensation for variance reduced algorithms
        (NeurIPS 2021). The coefficients follow from asking the errors to telescope.
    """

    server_compressor: Compressor = Identity()  # noqa: RUF009 - frozen
    alpha: Scheduled = 0.1
    beta: float = 0.3
    scratch: ClassVar[frozenset[str]] = frozenset({"mean", "answer", "next_filtered", "alpha"})
    reduced_in_place: ClassVar[frozenset[str]] = frozenset()  # vectors are swapped
    pulled_in_place: ClassVar[frozenset[str]] = frozenset({"direction"})
    merging: ClassVar[Mapping[str, Merge]] = {
        "worker.last": Merge.MEAN,
        "worker.before": Merge.MEAN,
        "worker.filtered": Merge.MEAN,
        "worker.direction": Merge.SHARED,
        "server.last": Merge.SHARED,
        "server.before": Merge.SHARED,
        "server.filtered": Merge.SHARED,
    }
    can_listen: ClassVar[bool] = False  # only `push` sets alpha_t, the weight of an answer

    def __post_init__(self) -> None:
        super().__post_init__()
        require_server_compressor(self, optional=False)
        keep_weight(self, "alpha")
        keep_number(self, "beta", "(0, 1]", "1 takes Delta_t over as it is", "a weight")
        for compressor in (self.compressor, self.server_compressor):
            require_no_amplifier("ErrorCompensatedX", compressor)

    @classmethod
    def examples(cls, compressor: Compressor) -> tuple[Method, ...]:
        try:
            return (cls(compressor, server_compressor=compressor, alpha=0.5, beta=0.3),)
        except ValueError:
            return ()

    def init(self, x: Array, workers: int = 1) -> tuple[ECXState, ECXServer]:
        def filters() -> dict[str, Array]:
            names = ("filtered", "next_filtered") if self.beta < 1 else ()
            return {name: vector_like(x) for name in names}

        last, before, direction, answer = (vector_like(x) for _ in range(4))
        state = ECXState(last, before, direction, answer, **filters())
        return state, ECXServer(*(vector_like(x) for _ in range(3)), **filters())

    def uncompressed(self) -> ErrorCompensatedX:
        return ErrorCompensatedX(Identity(), alpha=self.alpha, beta=1.0)

    def push(
        self, state: ECXState, gradient: Array, key: Key = DEFAULT_KEY
    ) -> tuple[Payload, ECXState]:
        self._compensate(gradient, state, key.step)
        message, residual = self.compressor.compress_with_residual(gradient, key)
        return message, state._replace(
            last=residual,
            before=state.last,
            filtered=state.next_filtered,
            next_filtered=state.filtered,
            alpha=value_at(self.alpha, key.step),
        )

    def reduce(
        self, server: ECXServer, messages: Sequence[Payload], key: Key
    ) -> tuple[Payload, ECXServer]:
        mean, _ = super().reduce(server, messages, key)
        self._compensate(mean, server, key.step)
        answer, residual = self.server_compressor.compress_with_residual(mean, key)
        return answer, ECXServer(
            last=residual,
            before=server.last,
            mean=server.before,  # free now
            filtered=server.next_filtered,
            next_filtered=server.filtered,
        )

    def pull(self, state: ECXState, aggregate: Array | Payload) -> tuple[Array, ECXState]:
        answer = decoded(aggregate, state.answer)
        namespace(answer).average(state.direction, answer, state.alpha, out=state.direction)
        return state.direction, state

    def _compensate(self, a: Array, state: ECXState | ECXServer, step: int) -> None:
        """a += e_t; of the other arrays, changes only `next_filtered`."""
        xp = namespace(a)
        now = value_at(self.alpha, step)
        one, two = (value_at(self.alpha, max(step - back, 0)) / now for back in (1, 2))
        weight_last, weight_before = one * (2 - now), -two * (1 - now)
        if state.filtered is None:
            xp.add(a, state.last, weight_last)
            if weight_before:  # alpha = 1 is bitwise DoubleSqueeze, signs of zeros too
                xp.add(a, state.before, weight_before)
            return
        xp.average(state.filtered, state.last, self.beta, out=state.next_filtered)
        xp.add(state.next_filtered, state.last, self.beta * (weight_last - 1))
        xp.add(state.next_filtered, state.before, self.beta * weight_before)
        xp.add(a, state.next_filtered)
