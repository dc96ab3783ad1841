"""Compressed SGD that escapes saddle points: noise, and periodic resets of the error memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.common.options import keep_choice, keep_number, keep_whole
from ef_horovod.compressors.base import DEFAULT_KEY, Compressor, Payload
from ef_horovod.compressors.identity import Identity
from ef_horovod.methods.base import MeanState, Method, vector_like
from ef_horovod.methods.error_feedback import ErrorFeedbackState, require_no_amplifier
from ef_horovod.methods.merging import Merge
from ef_horovod.methods.registry import register_method

RESETS = ("flush", "drop")


@register_method
@dataclass(frozen=True)
class PerturbedCompressedSGD(Method):
    """u = e + g + noise; send C(u); e = u - C(u); direction = mean_i C(u_i); e reset periodically.

    The noise is Gaussian, drawn from the key for each worker and step, and passes through the error
    memory. Every `reset_every` steps the error memory is cleared, which bounds the error of
    compressors that are not linear. "flush" sends u uncompressed in that step, so nothing is lost;
    "drop" discards the error. Linear compressors (`RandomK` with shared indices) need no reset.
    State: one vector per rank.

    Args:
        compressor: one that does not amplify errors.
        noise: standard deviation of each coordinate of each worker's noise; the mean over n workers
            has noise / sqrt(n).
        reset_every: steps between resets, or None.
        reset: "flush" or "drop".

    Raises:
        ValueError: a number out of range, another reset, or a compressor that amplifies errors.

    Example:
        >>> import ef_horovod as ef
        >>> ef.PerturbedCompressedSGD(ef.RandomK(0.1), noise=0.01).reset
        'flush'

    References:
        Avdiukhin, Yaroslavtsev: Escaping Saddle Points with Compressed SGD (NeurIPS 2021). The
        paper's body was not at hand: the order of noise and feedback, and "flush" as the meaning of
        its reset, are a reading of its abstract.
    """

    noise: float = 0.0
    reset_every: int | None = None
    reset: str = "flush"
    pulled_in_place: ClassVar[frozenset[str]] = frozenset()
    merging: ClassVar[Mapping[str, Merge]] = {"worker.error": Merge.MEAN}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_no_amplifier("PerturbedCompressedSGD", self.compressor)
        what, way_out = "a standard deviation", "0 is plain error feedback"
        keep_number(self, "noise", "[0, inf)", way_out, what)
        keep_whole(self, "reset_every", 1, None, "leave it out for no reset", optional=True)
        keep_choice(self, "reset", RESETS, "'flush' loses nothing")

    @classmethod
    def examples(cls, compressor: Compressor) -> tuple[Method, ...]:
        try:
            return (
                cls(compressor, noise=0.1, reset_every=7),
                cls(compressor, noise=0.1, reset_every=7, reset="drop"),
            )
        except ValueError:
            return ()

    def uncompressed(self) -> Method | None:
        return PerturbedCompressedSGD(Identity(), self.noise) if self.noise else None

    def init(self, x: Array, workers: int = 1) -> tuple[ErrorFeedbackState, MeanState]:
        return ErrorFeedbackState(vector_like(x)), MeanState(vector_like(x))

    def push(
        self, state: ErrorFeedbackState, gradient: Array, key: Key = DEFAULT_KEY
    ) -> tuple[Payload, ErrorFeedbackState]:
        xp = namespace(gradient)
        xp.add(gradient, state.error)
        if self.noise:
            noise = normal(gradient.shape[0], key)
            xp.add(gradient, xp.from_host(noise, getattr(gradient, "device", None)), self.noise)
        message, residual = self._compressor_at(key.step).compress_with_residual(gradient, key)
        forget = self.reset == "drop" and self._resets_at(key.step)
        return message, ErrorFeedbackState(error=vector_like(gradient) if forget else residual)

    def skip(self, gradient: Array, key: Key) -> Payload:
        return self._compressor_at(key.step).skip(gradient, key)

    def _compressor_at(self, step: int) -> Compressor:
        return Identity() if self.reset == "flush" and self._resets_at(step) else self.compressor

    def _resets_at(self, step: int) -> bool:
        return self.reset_every is not None and (step + 1) % self.reset_every == 0


def normal(length: int, key: Key) -> np.ndarray:
    """float32[length] of standard normal numbers, from the key and its rank."""
    # A new generator per call: no state is kept, and no global generator is used.
    generator = np.random.Generator(np.random.Philox(key=key.apart(3).draw(shared=False)))
    return generator.standard_normal(length, np.float32)
