"""What a method is: two pure halves around the wire, one for workers and one for the aggregator.

    push    worker      gradient -> message
    reduce  aggregator  messages of all workers -> aggregate
    pull    worker      aggregate -> direction, which the optimizer gets in place of the gradient

With a gather or reduce exchange every rank runs `reduce` itself on its own replica of the server
state; with a parameter server, the server does, and with a double pass each rank for one slice of
the vector. So a method is written once for all of them.

Ownership, so that nothing is copied on the step path and a step can still be dropped:

- `push` may overwrite `gradient` and leaves x - C(x) in it (x is what it compressed), but changes
  no array of `state`: whoever wants to drop the step keeps the old state and is where it was.
- `reduce` and `pull` commit: they may change the arrays of the states that they are given, and the
  returned aggregate and direction are valid until the next call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.common.repr import Shown
from ef_horovod.compressors.base import DEFAULT_KEY, Compressor, Payload, mean_at_once
from ef_horovod.errors import UnsupportedError, without_adapter

State = Any  # a NamedTuple of each method's own


class MeanState(NamedTuple):
    """The aggregator's state of methods without memory there: room for the mean."""

    mean: Array  # float32[d]


@dataclass(frozen=True)
class Method(Shown):
    """Base of all methods; single-pass ones without a memory at the aggregator inherit `reduce`.

    Args:
        compressor: what messages are made with.

    Raises:
        UnsupportedError: something else than a compressor was given.
    """

    compressor: Compressor

    # Fields of the states that hold nothing between steps: checkpoints leave them out.
    scratch: ClassVar[frozenset[str]] = frozenset({"mean"})
    # Vectors of the aggregator's state that `reduce` changes in place, None if that is not known:
    # a server that may have to take a round back copies them before.
    reduced_in_place: ClassVar[frozenset[str] | None] = None
    # The same of the worker's state and `pull`: copied before a step that may still be left out.
    pulled_in_place: ClassVar[frozenset[str] | None] = None
    # Whether workers may miss rounds, and `listen` to them: what a round means must not depend on
    # the step that a worker last took part in.
    can_listen: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.compressor, Compressor):
            raise UnsupportedError(
                f"{type(self).__name__} got {self.compressor!r}, expected a compressor; "
                f"write for example {type(self).__name__}(TopK(ratio=0.01))"
            )

    @property
    def allreducible(self) -> bool:
        """Whether messages may be summed in flight: then `reduce` gets one for all workers."""
        return self.compressor.allreducible

    @property
    def fixed_size(self) -> bool:
        """Whether the messages of a step are equally long on all ranks."""
        return self.compressor.fixed_size

    @property
    def fixed_size_answers(self) -> bool:
        """Whether the aggregator's answers are equally long in all steps."""
        down = getattr(self, "down", None)
        return not isinstance(down, Compressor) or down.fixed_size

    @property
    def sliceable(self) -> bool:
        """Whether a vector may be cut anywhere, into slices with states of their own.

        So it is unless a method asks for the shapes in a vector.
        """
        return type(self).for_shapes is Method.for_shapes

    @classmethod
    def examples(cls, compressor: Compressor) -> tuple[Method, ...]:
        """Instances with the given compressor, for the contract tests."""
        return (cls(compressor),)

    def compress(self, *_: Any) -> Any:
        """Not there: raises with the way out where stock Horovod asks for it.

        Raises:
            UnsupportedError: always.
        """
        raise without_adapter(self)

    decompress = compress

    def for_shapes(self, shapes: Sequence[tuple[int, ...]]) -> Method:
        """The method for vectors that hold arrays of these shapes, one after the other in C order.

        Adapters ask before they open a channel; whoever has a bare vector does not.
        """
        return self

    def init(self, x: Array, workers: int = 1) -> tuple[State, State]:
        """States of a worker and of the aggregator of so many, for vectors like x: float32[d]."""
        raise NotImplementedError

    def uncompressed(self) -> Method | None:
        """What treats parameters that stay uncompressed alike; None if plain averages do."""
        return None

    def message_length(self, d: int, step: int) -> int:
        """Numbers in a step's messages, and in the mean of them, for gradients of d numbers."""
        return d

    def skip(self, gradient: Array, key: Key) -> Payload:
        """A message as long as this step's others that says only: drop the step on all ranks."""
        return self.compressor.skip(gradient, key)

    def push(self, state: State, gradient: Array, key: Key = DEFAULT_KEY) -> tuple[Payload, State]:
        """Compress what this worker has to say.

        Args:
            state: the worker's.
            gradient: float32[d], overwritten with what the compressor lost.
            key: what random compressors draw from.

        Raises:
            NonFiniteError: the vector to compress has a NaN or an infinity; state is as it was.
        """
        raise NotImplementedError

    def reduce(
        self, server: State, messages: Sequence[Payload], key: Key
    ) -> tuple[Array | Payload, State]:
        """Mean over workers of what the messages say.

        Args:
            server: the aggregator's state.
            messages: one for each worker in rank order, or a single one that stands for their sum.
            key: the aggregator's, equal on all ranks; `key.workers` is the number of workers.

        Returns:
            What all workers get, and the state: a float32[d], or from methods that compress in
            both directions the payload that a server would broadcast.
        """
        return mean_of(messages, key.workers, out=server.mean), server

    def pull(self, state: State, aggregate: Array | Payload) -> tuple[Array, State]:
        """Turn the aggregate into the direction; commits the worker's state."""
        return aggregate, state

    def listen(self, state: State, aggregate: Array | Payload) -> Array:
        """The direction of a round in which this worker has said nothing.

        What it changes are arrays of the state, in place.
        """
        return self.pull(state, aggregate)[0]

    def add_message(self, state: State, message: Payload, dense: Array) -> None:
        """dense += what a worker's own message says of its gradient, float32[d].

        Args:
            state: the worker's after the step of the message.
        """
        message.add_to(dense)

    def span(self, field: str, start: int, stop: int, d: int) -> tuple[int, int]:
        """Where in a vector of the states lies what belongs to elements start to stop of d.

        Checkpoints keep it under the name of the parameter that those elements are of.
        """
        return start, stop


def mean_of(
    messages: Sequence[Payload], workers: int, out: Array, plus: Array | None = None
) -> Array:
    """`out`, overwritten with what the messages say in sum, over the number of workers.

    Args:
        messages: one for each worker in rank order, or a single one that stands for their sum.
        workers: how many they are from.
        out: float32[d].
        plus: float32[d] to add to the mean.

    Messages that are shorter than the vector, all together, are decoded in one pass over memory
    where their compressor can. Each number is made by the same operations in the same order in any
    case.
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
    """float32[d] of zeros, like x: float32[d]."""
    return namespace(x).zeros(x.shape[0], getattr(x, "device", None))
