"""Momentum correction: SGD's momentum per worker, before the compression."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.common.options import keep_flag, keep_number
from ef_horovod.compressors.base import DEFAULT_KEY, Compressor, Payload
from ef_horovod.compressors.identity import Identity
from ef_horovod.methods.base import MeanState, Method, SGDMomentum, vector_like
from ef_horovod.methods.clipping import clip_norm, keep_clip
from ef_horovod.methods.error_feedback import require_no_amplifier
from ef_horovod.methods.merging import Merge
from ef_horovod.methods.registry import register_method


class MomentumCorrectionState(NamedTuple):
    """A worker's velocity, and the sum of velocities that was not sent yet."""

    accumulation: Array  # float32[d], v, in units of the gradient
    velocity: Array | None = None  # float32[d], u, with momentum
    next_velocity: Array | None = None  # float32[d], becomes u when the step commits


@register_method
@dataclass(frozen=True)
class MomentumCorrection(Method):
    """u = m u + g; v = v + u; send C(v); v = v - C(v); direction = mean_i C(v_i); u = 0 where sent.

    Deep Gradient Compression's momentum correction. The optimizer is SGD without momentum. In plain
    error feedback under momentum SGD, an entry that waits in the error memory enters the velocity
    late and once. Here each gradient enters its worker's velocity at once, and what waits is the
    sum of velocities. m = 0 is `ErrorFeedback`. Without masking and without compression it is
    momentum SGD. State: two vectors per rank and one for work.

    Args:
        compressor: a contraction, or another one that `supports_error_feedback`.
        momentum: m in [0, 1), as in torch.optim.SGD without dampening.
        nesterov: as in torch.optim.SGD: v = v + g + m u.
        masking: momentum factor masking: u = 0 at the entries that were sent, so that old velocity
            does not move them twice. For sparsifiers, including `Then`; None masks for these only.
            An entry that is sent in each step then has no momentum.
        clip: before all else, each worker scales its gradient down to a norm of at most
            clip / sqrt(n), where n is the number of workers; None: not. The norm is that of the
            vector that is compressed: a bucket, not the model.

    Raises:
        ValueError: a number out of range, a compressor without a known bound on the error memory,
            masking for a compressor that is no sparsifier, or nesterov without momentum.

    Example:
        >>> import ef_horovod as ef
        >>> ef.MomentumCorrection(ef.TopK(ratio=0.001), nesterov=True).momentum
        0.9

    References:
        Lin, Han, Mao, Wang, Dally: Deep Gradient Compression (ICLR 2018), Algorithms 1 and 2.
    """

    momentum: float = 0.9
    nesterov: bool = False
    masking: bool | None = None
    clip: float | None = None
    scratch: ClassVar[frozenset[str]] = frozenset({"mean", "next_velocity"})
    pulled_in_place: ClassVar[frozenset[str]] = frozenset()  # vectors are swapped
    merging: ClassVar[Mapping[str, Merge]] = {
        "worker.accumulation": Merge.MEAN,
        "worker.velocity": Merge.MEAN,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_no_amplifier("MomentumCorrection", self.compressor)
        keep_number(self, "momentum", "[0, 1)", "0.9 is usual", "the weight of the old velocity")
        keep_flag(self, "nesterov")
        if self.nesterov and not self.momentum:
            raise ValueError(
                "MomentumCorrection got nesterov=True with momentum=0, expected a momentum; leave "
                "nesterov out, or write momentum=0.9"
            )
        if self.masking is not None:
            keep_flag(self, "masking")
        if self.masking and not self.compressor.sends_entries:
            raise ValueError(
                f"MomentumCorrection got masking=True with {self.compressor}, which sends no "
                "single entries, expected a sparsifier; leave masking out, or take TopK"
            )
        keep_clip(self)

    @classmethod
    def examples(cls, compressor: Compressor) -> tuple[Method, ...]:
        if not compressor.supports_error_feedback:
            return ()
        return cls(compressor), cls(compressor, nesterov=True, masking=False, clip=1.0)

    @property
    def sgd_momentum(self) -> SGDMomentum | None:
        return SGDMomentum(self.momentum, self.nesterov) if self.momentum else None

    def uncompressed(self) -> Method | None:
        if not self.momentum and self.clip is None:
            return None
        return MomentumCorrection(Identity(), self.momentum, self.nesterov, clip=self.clip)

    def init(self, x: Array, workers: int = 1) -> tuple[MomentumCorrectionState, MeanState]:
        state = MomentumCorrectionState(vector_like(x))
        if self.momentum:
            state = state._replace(velocity=vector_like(x), next_velocity=vector_like(x))
        return state, MeanState(vector_like(x))

    def push(
        self, state: MomentumCorrectionState, gradient: Array, key: Key = DEFAULT_KEY
    ) -> tuple[Payload, MomentumCorrectionState]:
        xp, velocity = namespace(gradient), state.next_velocity
        if self.clip is not None:
            clip_norm(gradient, self.clip / math.sqrt(key.workers))
        if self.nesterov:
            xp.assign(velocity, gradient)
            xp.add(velocity, state.velocity, self.momentum)
            xp.add(gradient, velocity, self.momentum)
        elif velocity is not None:
            xp.add(gradient, state.velocity, self.momentum)
            xp.assign(velocity, gradient)
        xp.add(gradient, state.accumulation)
        message, residual = self.compressor.compress_with_residual(gradient, key)
        masks = self.compressor.sends_entries if self.masking is None else self.masking
        if masks and velocity is not None:
            message.clear(velocity)
        return message, MomentumCorrectionState(residual, velocity, state.velocity)
