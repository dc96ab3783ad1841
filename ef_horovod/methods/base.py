"""Base of methods: one half for workers, one for the aggregator.

    push    worker      gradient -> payload
    reduce  aggregator  payloads of all workers -> aggregate
    pull    worker      aggregate -> aggregated gradient, which the optimizer gets

A method is written once for all exchanges. With gather or reduce, every rank runs `reduce` on its
own replica of the aggregator's state. With a parameter server, the server runs it. With a double
pass, each rank runs it for one slice of the vector.

Ownership of arrays avoids copies in each step, and a step can still be dropped:

- `push` may overwrite `gradient` and leaves x - C(x) in it, where x is the compressed vector. It
  changes no array of `state`, so keeping the old state drops the step.
- `reduce` and `pull` commit: they may change the arrays of the given states. The returned aggregate
  and aggregated gradient are valid until the next call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.common.repr import Shown
from ef_horovod.compressors.base import DEFAULT_KEY, Compressor, Payload, mean_at_once
from ef_horovod.errors import UnsupportedError, without_adapter
from ef_horovod.methods.merging import Merge

State = Any  # a NamedTuple, defined by each method


class MeanState(NamedTuple):
    """The aggregator's state of methods that keep no other state there: room for the mean."""

    mean: Array  # float32[d]


class SGDMomentum(NamedTuple):
    """Momentum as torch.optim.SGD defines it, without dampening."""

    momentum: float
    nesterov: bool


@dataclass(frozen=True)
class Method(Shown):
    """Base of all methods; single-pass ones without state at the aggregator inherit `reduce`.

    Args:
        compressor: of the workers' payloads.

    Raises:
        UnsupportedError: `compressor` is not a compressor.
    """

    compressor: Compressor

    # Fields of the states that hold nothing between steps; checkpoints omit them.
    scratch: ClassVar[frozenset[str]] = frozenset({"mean"})
    # What becomes of each other field, "worker.FIELD" or "server.FIELD", in a job with another
    # number of workers; None if unknown.
    merging: ClassVar[Mapping[str, Merge] | None] = None
    # Vectors of the aggregator's state that `reduce` changes in place; None if unknown. A server
    # that may have to undo a round copies them first.
    reduced_in_place: ClassVar[frozenset[str] | None] = None
    # The same for the worker's state and `pull`; copied before a step that may be dropped.
    pulled_in_place: ClassVar[frozenset[str] | None] = None
    # Whether workers may miss rounds and call `listen`: decoding a round must not depend on the
    # last step that the worker took part in.
    can_listen: ClassVar[bool] = True
    # Whether aggregated gradients are finished updates; the optimizer must be plain SGD then.
    makes_updates: ClassVar[bool] = False
    # Whether compression must not start before some dense steps (`warm_up`).
    needs_dense_steps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.compressor, Compressor):
            raise UnsupportedError(
                f"{type(self).__name__} got {self.compressor!r}, expected a compressor; "
                f"write for example {type(self).__name__}(TopK(ratio=0.01))"
            )

    @property
    def allreducible(self) -> bool:
        """Whether payloads may be summed in flight; then `reduce` gets one for all workers."""
        return self.compressor.allreducible

    @property
    def fixed_size(self) -> bool:
        """Whether the payloads of a step have equal sizes on all ranks."""
        return self.compressor.fixed_size

    @property
    def fixed_size_answers(self) -> bool:
        """Whether the aggregator's answers have equal sizes in all steps."""
        down = getattr(self, "server_compressor", None)
        return not isinstance(down, Compressor) or down.fixed_size

    @property
    def sgd_momentum(self) -> SGDMomentum | None:
        """Momentum that the method has in place of the optimizer's, which must be 0 then."""
        return None

    @property
    def replaces_optimizer(self) -> bool:
        """Whether the method does a part of the optimizer's work: then it is needed on one rank."""
        return self.makes_updates or self.sgd_momentum is not None

    @property
    def sliceable(self) -> bool:
        """Whether a vector may be cut anywhere into slices with separate states.

        True unless a method needs the shapes in a vector.
        """
        return type(self).for_shapes is Method.for_shapes

    def require_mergeable(self) -> None:
        """Raise if the state fits the number of workers that it was made for, and no other.

        Raises:
            UnsupportedError: it does.
        """
        if self.merging is None:
            raise UnsupportedError(
                f"got {self!r}, which does not say what becomes of its state in a job with another "
                "number of ranks, expected a method with `merging`; save the state of each rank by "
                "compression_state_dict(), for a job with as many ranks"
            )

    @classmethod
    def examples(cls, compressor: Compressor) -> tuple[Method, ...]:
        """Instances with the given compressor, for the contract tests."""
        return (cls(compressor),)

    def compress(self, *_: Any) -> Any:
        """Always raises, for stock Horovod that got a method without an adapter.

        Raises:
            UnsupportedError: always.
        """
        raise without_adapter(self)

    decompress = compress

    def for_shapes(self, shapes: Sequence[tuple[int, ...]]) -> Method:
        """The method for vectors that hold arrays of these shapes, one after the other in C order.

        Adapters call it before they open a channel. Callers with a plain vector do not.
        """
        return self

    def init(self, x: Array, workers: int = 1) -> tuple[State, State]:
        """States of a worker and of the aggregator of `workers`, for vectors like x: float32[d]."""
        raise NotImplementedError

    def uncompressed(self) -> Method | None:
        """The equivalent method for uncompressed parameters; None if plain averages suffice."""
        return None

    def warm_up(self) -> Method | None:
        """The method of the dense steps before compression (`dense_steps`); None: plain averages.

        It works on this method's states, so that what it learns there is not lost. The default is
        `uncompressed()`, which must accept this method's states.
        """
        return self.uncompressed()

    def message_length(self, d: int, step: int) -> int:
        """Numbers in a step's payloads and in their mean, for gradients of d numbers."""
        return d

    def skip(self, gradient: Array, key: Key) -> Payload:
        """A payload of this step's size with the flag to drop the step on all ranks."""
        return self.compressor.skip(gradient, key)

    def push(self, state: State, gradient: Array, key: Key = DEFAULT_KEY) -> tuple[Payload, State]:
        """Compress this worker's contribution.

        Args:
            state: the worker's.
            gradient: float32[d], overwritten with the compression error.
            key: determines the draws of random compressors.

        Raises:
            NonFiniteError: the vector to compress has a NaN or an infinity; state is not changed.
        """
        raise NotImplementedError

    def reduce(
        self, server: State, messages: Sequence[Payload], key: Key
    ) -> tuple[Array | Payload, State]:
        """Mean of the payloads over workers.

        Args:
            server: the aggregator's state.
            messages: one payload per worker in rank order, or a single one with their sum.
            key: the aggregator's, equal on all ranks; `key.workers` is the number of workers.

        Returns:
            The aggregate for all workers, and the state. The aggregate is a float32[d]; in methods
            that compress both ways it is the payload that a server would broadcast.
        """
        return mean_of(messages, key.workers, out=server.mean), server

    def pull(self, state: State, aggregate: Array | Payload) -> tuple[Array, State]:
        """Turn the aggregate into the aggregated gradient; commits the worker's state."""
        return aggregate, state

    def listen(self, state: State, aggregate: Array | Payload) -> Array:
        """The aggregated gradient of a round in which this worker sent nothing.

        It changes arrays of the state in place.
        """
        return self.pull(state, aggregate)[0]

    def add_message(self, state: State, message: Payload, dense: Array) -> None:
        """dense += a worker's own payload as a part of its gradient, float32[d].

        Args:
            state: the worker's after the payload's step.
        """
        message.add_to(dense)

    def span(self, field: str, start: int, stop: int, d: int) -> tuple[int, int]:
        """Slice of a state's vector that belongs to the elements start to stop of d.

        Checkpoints save it under the name of the parameter with these elements.
        """
        return start, stop


def mean_of(
    messages: Sequence[Payload], workers: int, out: Array, plus: Array | None = None
) -> Array:
    """`out`, overwritten with the sum of the payloads over the number of workers.

    Args:
        messages: one payload per worker in rank order, or a single one with their sum.
        workers: number of workers.
        out: float32[d].
        plus: float32[d] to add to the mean.

    Payloads that are together shorter than the vector are decoded in one pass over memory if their
    compressor supports it. The result is bitwise the same in both cases.
    """
    xp = namespace(out)
    if mean_at_once(messages, workers, out, plus):
        return out
    xp.fill(out, 0.0)
    for message in messages:
        message.add_to(out)
    xp.divide(out, workers, out=out)
    if plus is not None:
        xp.add(out, plus)
    return out


def vector_like(x: Array) -> Array:
    """float32[d] of zeros, like float32[d] x."""
    return namespace(x).zeros(x.shape[0], getattr(x, "device", None))
