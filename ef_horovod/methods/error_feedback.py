"""The classic: what compression lost is added to the next gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ef_horovod.arrays import Array, namespace
from ef_horovod.compressors.base import DEFAULT_KEY, Compressor, Payload
from ef_horovod.keys import Key
from ef_horovod.methods.base import MeanState, Method
from ef_horovod.registry import register_method


class ErrorFeedbackState(NamedTuple):
    """A worker's error memory, in units of the gradient."""

    error: Array  # float32[d]


@register_method
@dataclass(frozen=True)
class ErrorFeedback(Method):
    """p = g + e; send C(p); e = p - C(p); direction = mean_i C(p_i).

    The error is kept in gradient units, so the sum of all that was sent plus the error is the sum
    of all gradients, and with a constant learning rate the virtual iterate x - lr mean_i e_i takes
    plain SGD steps. One vector of memory on each rank.

    Raises:
        ValueError: an unbiased compressor whose error can be larger than what it compresses; the
            memory would grow without bound.

    Example:
        >>> import ef_horovod as ef
        >>> ef.ErrorFeedback(ef.OneBit())
        ErrorFeedback(compressor=OneBit())

    References:
        Seide et al.: 1-Bit Stochastic Gradient Descent (Interspeech 2014). Stich, Cordonnier,
        Jaggi: Sparsified SGD with Memory (NeurIPS 2018), Algorithm 1. Karimireddy et al.: Error
        Feedback Fixes SignSGD (ICML 2019), Algorithm 2 (both with the step size inside the error).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if _amplifies(self.compressor):
            raise ValueError(
                f"ErrorFeedback got {self.compressor}, whose error can be larger than what it "
                "compresses, expected one that keeps the error smaller; take RandomK(scale="
                "'contractive') and the like, or NoFeedback for unbiased compressors"
            )

    @classmethod
    def examples(cls, compressor: Compressor) -> tuple[Method, ...]:
        return () if _amplifies(compressor) else (cls(compressor),)

    def init(self, x: Array) -> tuple[ErrorFeedbackState, MeanState]:
        xp, device = namespace(x), getattr(x, "device", None)
        return ErrorFeedbackState(xp.zeros(x.shape[0], device)), MeanState(
            xp.zeros(x.shape[0], device)
        )

    def push(
        self, state: ErrorFeedbackState, gradient: Array, key: Key = DEFAULT_KEY
    ) -> tuple[Payload, ErrorFeedbackState]:
        namespace(gradient).add(gradient, state.error)
        message, residual = self.compressor.squeeze(gradient, key)
        return message, ErrorFeedbackState(error=residual)


def _amplifies(compressor: Compressor) -> bool:
    """Unbiased with omega >= 1 at some usual length: e_t would grow like omega**t."""
    variance = compressor.variance(1000)
    return compressor.contraction(1000) is None and variance is not None and variance >= 1
