"""Classic error feedback: the compression error is added to the next gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.common.options import keep_number
from ef_horovod.compressors.base import DEFAULT_KEY, Compressor, Payload
from ef_horovod.methods.base import MeanState, Method, vector_like
from ef_horovod.methods.merging import Merge
from ef_horovod.methods.registry import register_method
from ef_horovod.methods.schedules import Scheduled, keep_schedule, value_at


class ErrorFeedbackState(NamedTuple):
    """A worker's error memory."""

    error: Array  # float32[d], in units of the gradient, or of the step with `step_inside`


@register_method
@dataclass(frozen=True)
class ErrorFeedback(Method):
    """p = g + e; send C(p); e = p - C(p); direction = mean_i C(p_i). Also known as MEM-SGD.

    The error is in gradient units, so the sum of all sent values plus the error is the sum of all
    gradients. With a constant learning rate the virtual iterate x - lr mean_i e_i takes plain SGD
    steps. With `step_inside` = the learning rate (a number or a `Decay`), the step is compressed
    instead of the gradient: p = lr g + e, direction = mean_i C(p_i) / lr. This keeps the virtual
    iterate exact while the learning rate changes. The two variants differ if it changes, and for
    compressors that are not homogeneous, such as a hard threshold. State: one vector per rank.

    With `decay` b < 1, p = g + b e: what was not sent fades. SparseLoCo takes 0.95 for updates of
    many local steps, in place of an outer momentum. Then the sum of what was sent is less than the
    sum of all gradients.

    Args:
        compressor: a contraction, or another one that `supports_error_feedback`.
        step_inside: the optimizer's learning rate, or None.
        decay: b in (0, 1]; 1 loses nothing.

    Raises:
        ValueError: a compressor without a known bound on the error memory, or a decay out of range.

    Example:
        >>> import ef_horovod as ef
        >>> ef.ErrorFeedback(ef.OneBit())
        ErrorFeedback(OneBit())

    References:
        Seide et al.: 1-Bit Stochastic Gradient Descent (Interspeech 2014). Stich, Cordonnier,
        Jaggi: Sparsified SGD with Memory (NeurIPS 2018), Algorithm 1. Karimireddy et al.: Error
        Feedback Fixes SignSGD (ICML 2019), Algorithm 2 (both with the step size inside the error).
        Decay: Sarfi et al.: SparseLoCo (arXiv 2508.15706, 2025).
    """

    step_inside: Scheduled | None = None
    decay: float = 1.0
    pulled_in_place: ClassVar[frozenset[str]] = frozenset()
    merging: ClassVar[Mapping[str, Merge]] = {"worker.error": Merge.MEAN}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_no_amplifier("ErrorFeedback", self.compressor)
        keep_number(self, "decay", "(0, 1]", "leave it out to lose nothing")
        if self.step_inside is not None:
            what, way_out = "the optimizer's learning rate", "leave it out to compress gradients"
            keep_schedule(self, "step_inside", "(0, inf)", way_out, what)

    @classmethod
    def examples(cls, compressor: Compressor) -> tuple[Method, ...]:
        return (cls(compressor),) if compressor.supports_error_feedback else ()

    def init(self, x: Array, workers: int = 1) -> tuple[ErrorFeedbackState, MeanState]:
        return ErrorFeedbackState(vector_like(x)), MeanState(vector_like(x))

    def push(
        self, state: ErrorFeedbackState, gradient: Array, key: Key = DEFAULT_KEY
    ) -> tuple[Payload, ErrorFeedbackState]:
        xp = namespace(gradient)
        if self.step_inside is not None:
            xp.divide(gradient, 1.0 / value_at(self.step_inside, key.step), out=gradient)
        xp.add(gradient, state.error, self.decay)
        message, residual = self.compressor.compress_with_residual(gradient, key)
        return message, ErrorFeedbackState(error=residual)

    def reduce(
        self, server: MeanState, messages: Sequence[Payload], key: Key
    ) -> tuple[Array | Payload, MeanState]:
        mean, server = super().reduce(server, messages, key)
        if self.step_inside is not None:
            namespace(mean).divide(mean, value_at(self.step_inside, key.step), out=mean)
        return mean, server


def require_no_amplifier(method: str, compressor: Compressor) -> None:
    """Raise for compressors without a known bound on the error memory.

    With QSGD(1), for example, it grows by about a tenth per step for all gradients.

    Raises:
        ValueError: the compressor has no such bound.
    """
    weak = next((c for c in compressor.extremes if not c.supports_error_feedback), None)
    if weak is None:
        return
    if weak.unbiased:
        raise ValueError(
            f"{method} got {weak}, whose error can be larger than what it compresses, "
            "expected one that keeps the error smaller; take RandomK(scale='contractive') and the "
            "like, Scaled(...) or a smaller bucket for quantizers, or NoFeedback for unbiased ones"
        )
    raise ValueError(
        f"{method} got {weak}, of whose error no bound is known, expected a contraction; "
        "state contraction(d), or supports_error_feedback if the error has a bound of another kind"
    )
