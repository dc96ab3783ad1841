"""DoubleSqueeze: compression with error feedback both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.compressors.base import DEFAULT_KEY, Compressor, Payload
from ef_horovod.compressors.identity import Identity
from ef_horovod.methods.base import Method, mean_of, vector_like
from ef_horovod.methods.error_feedback import require_no_amplifier
from ef_horovod.methods.merging import Merge
from ef_horovod.methods.registry import register_method
from ef_horovod.methods.server_compressor import decoded, require_server_compressor


class DoubleSqueezeState(NamedTuple):
    """A worker's error memory, in units of the gradient."""

    error: Array  # float32[d], delta_i
    direction: Array  # float32[d], room for the server's answer


class DoubleSqueezeServer(NamedTuple):
    """The aggregator's error memory."""

    error: Array  # float32[d], delta
    mean: Array  # float32[d]


@register_method
@dataclass(frozen=True)
class DoubleSqueeze(Method):
    """v_i = g_i + d_i; send q_i = C(v_i); d_i = v_i - q_i, and the same at the aggregator:
    v = mean_i q_i + d; answer q = C_down(v); d = v - q; direction = q.

    With a constant learning rate the virtual iterate x - lr (d + mean_i d_i) takes plain SGD
    steps. With `server_compressor=Identity()` it is MEM-SGD, as is `ErrorFeedback`. State: one
    vector per worker and one at the aggregator; if every rank aggregates, both on each rank.

    Args:
        compressor: of the workers.
        server_compressor: of the aggregator.

    Raises:
        ValueError: a compressor whose error can be larger than its input.
        UnsupportedError: `server_compressor` is not a compressor.

    Example:
        >>> import ef_horovod as ef
        >>> top = ef.TopK(ratio=0.01)
        >>> ef.DoubleSqueeze(top, server_compressor=ef.TopK(ratio=0.05)).server_compressor
        TopK(ratio=0.05)

    References:
        Tang, Lian, Yu, Zhang, Liu: DoubleSqueeze: Parallel Stochastic Gradient Descent with
        Double-Pass Error-Compensated Compression (ICML 2019), Algorithm 1.
    """

    server_compressor: Compressor = Identity()  # noqa: RUF009 - frozen
    scratch: ClassVar[frozenset[str]] = frozenset({"mean", "direction"})
    reduced_in_place: ClassVar[frozenset[str]] = frozenset()  # vectors are swapped
    pulled_in_place: ClassVar[frozenset[str]] = frozenset()
    merging: ClassVar[Mapping[str, Merge]] = {
        "worker.error": Merge.MEAN,
        "server.error": Merge.SHARED,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_server_compressor(self, optional=False)
        for compressor in (self.compressor, self.server_compressor):
            require_no_amplifier("DoubleSqueeze", compressor)

    @classmethod
    def examples(cls, compressor: Compressor) -> tuple[Method, ...]:
        try:
            return (cls(compressor, server_compressor=compressor),)
        except ValueError:
            return ()

    def init(self, x: Array, workers: int = 1) -> tuple[DoubleSqueezeState, DoubleSqueezeServer]:
        return (
            DoubleSqueezeState(error=vector_like(x), direction=vector_like(x)),
            DoubleSqueezeServer(error=vector_like(x), mean=vector_like(x)),
        )

    def push(
        self, state: DoubleSqueezeState, gradient: Array, key: Key = DEFAULT_KEY
    ) -> tuple[Payload, DoubleSqueezeState]:
        namespace(gradient).add(gradient, state.error)
        message, residual = self.compressor.compress_with_residual(gradient, key)
        return message, state._replace(error=residual)

    def reduce(
        self, server: DoubleSqueezeServer, messages: Sequence[Payload], key: Key
    ) -> tuple[Payload, DoubleSqueezeServer]:
        compensated = mean_of(messages, key.workers, out=server.mean, plus=server.error)
        answer, residual = self.server_compressor.compress_with_residual(compensated, key)
        # The residual uses the mean's memory, so the old error's is free.
        return answer, DoubleSqueezeServer(error=residual, mean=server.error)

    def pull(
        self, state: DoubleSqueezeState, aggregate: Array | Payload
    ) -> tuple[Array, DoubleSqueezeState]:
        return decoded(aggregate, state.direction), state
