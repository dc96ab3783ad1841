"""Compressed gradients without error feedback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ef_horovod.arrays import Array
from ef_horovod.arrays.keys import Key
from ef_horovod.compressors.base import DEFAULT_KEY, Compressor, Payload
from ef_horovod.methods.base import MeanState, Method, vector_like
from ef_horovod.methods.merging import Merge
from ef_horovod.methods.registry import register_method
from ef_horovod.methods.server_compressor import decoded, require_server_compressor


class NoFeedbackState(NamedTuple):
    """No state between steps."""

    direction: Array | None = (
        None  # float32[d], with `server_compressor`: room for the server's answer
    )


@register_method
@dataclass(frozen=True)
class NoFeedback(Method):
    """direction = mean_i C(g_i), or with `server_compressor` C_down(mean_i C(g_i)).

    For unbiased compressors and for `Identity`, with which it is plain data-parallel SGD. A biased
    compressor without feedback stalls or diverges (Karimireddy et al. 2019, Section 3). With `TopK`
    it is the baseline "Top-k SGD" of the DoubleSqueeze paper, with `QSGD` its "QSGD".

    Args:
        compressor: of the workers.
        server_compressor: of the aggregator, or None if answers are not compressed.

    Example:
        >>> import ef_horovod as ef
        >>> ef.NoFeedback(ef.Identity())
        NoFeedback(Identity())
    """

    server_compressor: Compressor | None = None
    scratch: ClassVar[frozenset[str]] = frozenset({"mean", "direction"})
    pulled_in_place: ClassVar[frozenset[str]] = frozenset()
    merging: ClassVar[Mapping[str, Merge]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_server_compressor(self)

    @classmethod
    def examples(cls, compressor: Compressor) -> tuple[Method, ...]:
        return cls(compressor), cls(compressor, server_compressor=compressor)

    def init(self, x: Array, workers: int = 1) -> tuple[NoFeedbackState, MeanState]:
        direction = vector_like(x) if self.server_compressor is not None else None
        return NoFeedbackState(direction), MeanState(vector_like(x))

    def push(
        self, state: NoFeedbackState, gradient: Array, key: Key = DEFAULT_KEY
    ) -> tuple[Payload, NoFeedbackState]:
        message, _ = self.compressor.compress_with_residual(gradient, key)
        return message, state

    def reduce(
        self, server: MeanState, messages: Sequence[Payload], key: Key
    ) -> tuple[Array | Payload, MeanState]:
        mean, server = super().reduce(server, messages, key)
        return (
            mean
            if self.server_compressor is None
            else self.server_compressor.compress_with_residual(mean, key)[0]
        ), server

    def pull(
        self, state: NoFeedbackState, aggregate: Array | Payload
    ) -> tuple[Array, NoFeedbackState]:
        return (
            aggregate if self.server_compressor is None else decoded(aggregate, state.direction)
        ), state
