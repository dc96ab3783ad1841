"""Adam under compression: the momentum is compressed, and the second moment stops before that."""

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
from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import MeanState, Method, vector_like
from ef_horovod.methods.clipping import clip_norm, keep_clip
from ef_horovod.methods.error_feedback import require_no_amplifier
from ef_horovod.methods.merging import Merge
from ef_horovod.methods.registry import register_method


class FrozenAdamState(NamedTuple):
    """A worker's error memory, and Adam's moments, which are the same on all ranks."""

    error: Array  # float32[d], in units of the momentum, or of the update with `precondition`
    momentum: Array  # float32[d], m, an average of gradients with weights that sum to 1
    second: Array  # float32[d], v, the same of squares
    update: Array  # float32[d], room for the result
    steps: int = 0  # steps taken


@register_method
@dataclass(frozen=True)
class FrozenAdam(Method):
    """p = b1 m + (1 - b1) g + e; send C(p); e = p - C(p); m = mean_i C(p_i); step by m / sqrt(v).

    1-bit Adam's way for any compressor. In the dense steps before (`dense_steps`, required), it is
    Adam, and learns v. Then v stays as it is, and the momentum m is compressed instead of the
    gradient. Each worker starts from the common m, so that one step of compression loses one
    gradient's part at most.

    Directions are Adam's updates, so the optimizer is plain SGD with Adam's learning rate. Its
    weight decay is AdamW's. Uncompressed parameters have Adam throughout. Between `synchronize()`
    and `step()` gradients are updates: use `clip` instead of a clipping there.

    With `precondition` the compressor gets p / sqrt(v). A sparsifier then sends the entries that
    move parameters most, and not those of the layers with the largest gradients. State: three
    vectors per rank and one for work.

    Args:
        compressor: a contraction, or another one that `supports_error_feedback`.
        beta1: of the momentum, as in torch.optim.AdamW.
        beta2: of the second moment.
        eps: added to the root of the second moment.
        floor: a frozen root is at least this part of the largest one in the vector. An entry
            without any gradient in the dense steps has the largest: it moves little.
        precondition: compress p / sqrt(v); None: for sparsifiers only. One scale for all signs
            suits p.
        clip: before all else, each worker scales its gradient down to a norm of at most
            clip / sqrt(n), where n is the number of workers; None: not. The norm is that of the
            vector that is compressed: a bucket, not the model.

    Raises:
        ValueError: a number out of range, or a compressor without a known bound on the error
            memory.
        UnsupportedError: in a step, if a whole vector had no gradient in the dense steps.

    Example:
        >>> import ef_horovod as ef
        >>> ef.FrozenAdam(ef.OneBit()).beta1
        0.9

    References:
        Tang, Gan, Awan, Rajbhandari, Li, Lian, Liu, Zhang, He: 1-bit Adam (ICML 2021), Algorithm 1,
        with one compression instead of two. Kingma, Ba: Adam (ICLR 2015), Algorithm 1. Loshchilov,
        Hutter: Decoupled Weight Decay Regularization (ICLR 2019), Algorithm 2.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    floor: float = 3e-4
    precondition: bool | None = None
    clip: float | None = None
    scratch: ClassVar[frozenset[str]] = frozenset({"mean", "update"})
    pulled_in_place: ClassVar[frozenset[str]] = frozenset({"momentum", "second"})
    merging: ClassVar[Mapping[str, Merge]] = {
        "worker.error": Merge.MEAN,
        "worker.momentum": Merge.SHARED,
        "worker.second": Merge.SHARED,
        "worker.steps": Merge.SHARED,
    }
    makes_updates: ClassVar[bool] = True
    needs_dense_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_no_amplifier("FrozenAdam", self.compressor)
        keep_number(self, "beta1", "[0, 1)", "0.9 is usual", "the weight of the old momentum")
        keep_number(self, "beta2", "[0, 1)", "0.999 is usual", "the weight of the old squares")
        keep_number(self, "eps", "(0, inf)", "1e-8 is usual", "a small number")
        keep_number(self, "floor", "[0, 1]", "3e-4 is usual", "a part of the largest root")
        if self.precondition is not None:
            keep_flag(self, "precondition")
        keep_clip(self)

    @classmethod
    def examples(cls, compressor: Compressor) -> tuple[Method, ...]:
        if not compressor.supports_error_feedback:
            return ()
        return cls(compressor), cls(compressor, precondition=not compressor.sends_entries, clip=1.0)

    def uncompressed(self) -> Method | None:
        return DenseAdam(Identity(), self.beta1, self.beta2, self.eps, clip=self.clip)

    def init(self, x: Array, workers: int = 1) -> tuple[FrozenAdamState, MeanState]:
        error, momentum, second, update = (vector_like(x) for _ in range(4))
        namespace(second).fill(second, 1.0)
        return FrozenAdamState(error, momentum, second, update), MeanState(vector_like(x))

    def push(
        self, state: FrozenAdamState, gradient: Array, key: Key = DEFAULT_KEY
    ) -> tuple[Payload, FrozenAdamState]:
        xp, steps = namespace(gradient), state.steps + 1
        self._clip(gradient, key)
        weight = _weight(self.beta1, steps)
        xp.divide(gradient, 1.0 / weight, out=gradient)
        xp.add(gradient, state.momentum, 1.0 - weight)
        if self._preconditions:
            xp.divide_by_root(gradient, state.second, *self._limits(state), out=gradient)
        xp.add(gradient, state.error)
        message, residual = self.compressor.compress_with_residual(gradient, key)
        return message, state._replace(error=residual, steps=steps)

    def pull(
        self, state: FrozenAdamState, aggregate: Array | Payload
    ) -> tuple[Array, FrozenAdamState]:
        xp, momentum, update = namespace(state.momentum), state.momentum, state.update
        self._require_learnt(state, aggregate)
        if self._preconditions:
            xp.assign(update, aggregate)
            xp.multiply_by_root(aggregate, state.second, *self._limits(state), out=momentum)
        else:
            xp.assign(momentum, aggregate)
            xp.divide_by_root(aggregate, state.second, *self._limits(state), out=update)
        return update, state

    @property
    def _preconditions(self) -> bool:
        return self.compressor.sends_entries if self.precondition is None else self.precondition

    def _limits(self, state: FrozenAdamState) -> tuple[float, float, float]:
        """The least root, the root of zero, and eps."""
        # Of the largest: a mean could differ between processors, and all ranks need the same.
        largest = math.sqrt(namespace(state.second).abs_max(state.second)) or 1.0
        return self.floor * largest, largest, self.eps

    def _require_learnt(self, state: FrozenAdamState, aggregate: Array) -> None:
        """Raise on all ranks for a vector whose first gradient comes after the dense steps."""
        xp = namespace(state.second)
        if not xp.abs_max(state.second) and xp.abs_max(aggregate):
            raise UnsupportedError(
                f"got the first gradient of a bucket after the dense steps with {self!r}, expected "
                "one in them, because Adam's second moment is learnt there; raise dense_steps, or "
                "keep these parameters uncompressed by dense="
            )

    def _clip(self, gradient: Array, key: Key) -> None:
        if self.clip is not None:
            clip_norm(gradient, self.clip / math.sqrt(key.workers))


@dataclass(frozen=True)
class DenseAdam(FrozenAdam):
    """Adam on averaged gradients: in the dense steps, and for uncompressed parameters."""

    needs_dense_steps: ClassVar[bool] = False

    def uncompressed(self) -> Method | None:
        return self

    def push(
        self, state: FrozenAdamState, gradient: Array, key: Key = DEFAULT_KEY
    ) -> tuple[Payload, FrozenAdamState]:
        self._clip(gradient, key)
        message, _ = self.compressor.compress_with_residual(gradient, key)
        return message, state._replace(steps=state.steps + 1)

    def pull(
        self, state: FrozenAdamState, aggregate: Array | Payload
    ) -> tuple[Array, FrozenAdamState]:
        xp, (_, momentum, second, update, steps) = namespace(state.momentum), state
        xp.average(momentum, aggregate, _weight(self.beta1, steps), out=momentum)
        xp.average_square(second, aggregate, _weight(self.beta2, steps), out=second)
        xp.divide_by_root(momentum, second, 0.0, 0.0, self.eps, out=update)
        return update, state


def _weight(beta: float, steps: int) -> float:
    """Of the newest of `steps` numbers in Adam's average, with its bias correction."""
    return (1.0 - beta) / (1.0 - beta**steps)
