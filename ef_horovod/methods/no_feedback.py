"""Compressed gradients as they are: what is lost is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ef_horovod.arrays import Array, namespace
from ef_horovod.compressors.base import DEFAULT_KEY, Payload
from ef_horovod.keys import Key
from ef_horovod.methods.base import MeanState, Method
from ef_horovod.registry import register_method


class NoFeedbackState(NamedTuple):
    """Nothing to remember."""


@register_method
@dataclass(frozen=True)
class NoFeedback(Method):
    """direction = mean_i C(g_i).

    Right for unbiased compressors and for `Identity`, which makes it plain data-parallel SGD. A
    biased compressor without feedback stalls or diverges (Karimireddy et al. 2019, Section 3).

    Example:
        >>> import ef_horovod as ef
        >>> ef.NoFeedback(ef.Identity())
        NoFeedback(compressor=Identity())
    """

    def init(self, x: Array) -> tuple[NoFeedbackState, MeanState]:
        xp = namespace(x)
        return NoFeedbackState(), MeanState(xp.zeros(x.shape[0], getattr(x, "device", None)))

    def push(
        self, state: NoFeedbackState, gradient: Array, key: Key = DEFAULT_KEY
    ) -> tuple[Payload, NoFeedbackState]:
        message, _ = self.compressor.squeeze(gradient, key)
        return message, state
