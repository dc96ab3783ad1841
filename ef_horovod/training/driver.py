"""What every adapter does with its buckets: compare, finish, undo, count, save and load.

An adapter derives from `StepDriver` and adds how its framework's gradients get into the buckets and
out of them. Each adapter's order of a step is in docs/design.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from ef_horovod.arrays import Array
from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.channel import Channel, finish_step
from ef_horovod.exchange.config_check import require_same_config
from ef_horovod.exchange.server import finish_rounds
from ef_horovod.exchange.stats import ChannelStats, total_stats
from ef_horovod.methods.base import Method
from ef_horovod.training.buckets import Slot, describe, own_methods
from ef_horovod.training.entries import Filled
from ef_horovod.training.merging import merge
from ef_horovod.training.state import keeps_state, load_state, merged_facts, save_state
from ef_horovod.transports.base import Transport


def require_state(state: Any) -> None:
    """Raise unless this is a dict, as of `compression_state_dict()`.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(state, Mapping):
        raise ValueError(
            f"got {type(state).__name__} as a compression state, expected the dict of "
            "compression_state_dict(); pass what it returned, or what a file holds of it"
        )


class LayerNorms(NamedTuple):
    """Euclidean norms at one step, over a parameter of this rank."""

    error: float  # ||x - C(x)||, where x is what was compressed: the gradient and older errors
    gradient: float


B = TypeVar("B", bound=Filled)


class StepDriver(Generic[B]):
    """The buckets of one rank, and the number of their next step.

    Args:
        method: error-feedback method of the compressed buckets.
        transport: to the other ranks, or to servers.
        buckets: may also be made later.
    """

    step: Any = 0  # number of the next step; a dropped step's number is used again
    compressed = "gradients"  # or "updates"
    has_newcomers = False  # whether ranks come in later, for which loading must not be collective

    def __init__(self, method: Method, transport: Transport, buckets: Sequence[B] = ()) -> None:
        self.method, self.transport, self.buckets = method, transport, buckets

    def stats(self) -> list[ChannelStats]:
        """One row per bucket, then the total; call it between steps."""
        rows = [channel.stats() for channel in self._channels()]
        return [*rows, total_stats(rows)]

    def methods(self) -> list[Method]:
        """Those of the opened buckets."""
        return [channel.method for channel in self._channels()]

    @property
    def drivers(self) -> list[StepDriver[Any]]:
        """Itself; optimizers and reducers have none with a single rank, or several."""
        return [self]

    def steps_taken(self) -> int:
        """Number of committed steps, those before a loaded state included."""
        return self._steps_done()

    def measure(self) -> None:
        """Let the next step take the norms of its gradients for `layer_norms`."""
        for bucket in self.buckets:
            if bucket.channel.pieces():  # not rows, which are sent as they are
                bucket.channel.measure([(slot.start, slot.stop) for slot in bucket.slots])

    def layer_norms(self) -> dict[str, LayerNorms]:
        """Norms by parameter at the last step, if `measure` was called before it.

        Dropped steps have none. Call it between steps.
        """
        measured = [(b.slots, b.channel.measured()) for b in self.buckets if b.channel.pieces()]
        if not all(norms for _, norms in measured):
            return {}
        return {
            slot.name: LayerNorms(math.sqrt(error), math.sqrt(gradient))
            for slots, norms in measured
            for slot, (error, gradient) in zip(slots, norms, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """This rank's error-feedback state by parameter name; save one file per rank."""
        state = save_state(self.buckets, self._steps_done(), self.method, self.transport)
        return state | {"compressed": self.compressed}

    def merged_state_dict(self) -> dict[str, Any]:
        """The error-feedback state of all ranks together, for any number of ranks; collective.

        Raises:
            UnsupportedError: servers keep a part of it, or a method's state cannot be merged.
        """
        return self.describe_merged(merge(self.buckets, self.transport))

    def describe_merged(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Merged parameters with all that belongs to the state; not collective."""
        facts = merged_facts(self.buckets, self._steps_done(), self.method, self.transport)
        return {**facts, "parameters": parameters, "compressed": self.compressed}

    def checkpoint(self) -> dict[str, Any]:
        """`state_dict` after the servers, if any, have saved their state; collective.

        Call it between two steps, after the same step on all ranks. Save the result with the model,
        one file per rank.

        Raises:
            ProtocolError: the servers were started without --checkpoint.
        """
        self.transport.save(self._steps_done())
        return self.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`, from the same rank of an equal job.

        The result of `merged_state_dict` loads on any number of ranks.

        Raises:
            UnsupportedError: with servers, after the first step; servers load their state before.
            ValueError: the rank, number of ranks, method or model differs, or the state is that of
                gradients where updates are compressed, or the other way round.
        """
        self._require_own(state)
        self._set_step(load_state(state, self.buckets, self.method, self.transport))

    def _require_own(self, state: dict[str, Any]) -> None:
        require_state(state)
        if state.get("compressed", self.compressed) != self.compressed:
            raise ValueError(
                f"got a compression state of {state['compressed']}, expected one of "
                f"{self.compressed}, which have other units; load it into the wrapper that saved "
                "it, or start without it"
            )

    def forget(self) -> None:
        """Reset the error-feedback state to that before the first step; call it on all ranks.

        Raises:
            UnsupportedError: after the first step, if the method learns in dense steps.
        """
        if self.method.needs_dense_steps and self._steps_done():
            raise UnsupportedError(
                f"got new values of variables after {self._steps_done()} steps with "
                f"{self.method!r}, expected them before the first step, because Adam's second "
                "moment would be lost; make a new optimizer or reducer, which begins with its "
                "dense steps"
            )
        for channel in self._channels():
            channel.forget()

    def count_left_out(self) -> None:
        """Count a step that all ranks left out before anything of it was compressed."""
        for channel in self._channels():
            channel.counters.skipped += 1

    @property
    def has_state(self) -> bool:
        """Whether error-feedback state is kept between steps."""
        return keeps_state(self.buckets)

    def _compare(self, options: Iterable[str], *, several_rounds: bool = False) -> None:
        """Before the first exchange: compare options and buckets, connect to servers; collective.

        Raises:
            ConfigMismatchError: they differ between ranks.
        """
        facts, own = describe(self.buckets), own_methods(self.buckets, self.method)
        policy = [
            f"parameter '{name}' by its own method {method!r}" for name, method in own.items()
        ]
        usual = f"compression {self.method!r}"
        # First the options, with the exchange: a rank with another one may have that fact alone.
        require_same_config(self.transport, [*options, usual, *policy, *facts])
        self.transport.handshake(facts, self._steps_done(), several_rounds=several_rounds)

    def _finish(
        self, buckets: Sequence[B] | None = None, *, good: bool = True, undoable: bool = False
    ) -> list[Array] | None:
        """Wait for the started buckets (default all), then commit all or none; see `finish_step`.

        Returns:
            The buckets' aggregated gradients; None for a step that all ranks dropped.
        """
        directions = finish_step(self._channels(buckets), good=good, undoable=undoable)
        self._set_step(self._steps_done() + (directions is not None))
        return directions

    def _finish_rounds(self) -> list[list[Array]]:
        """`_finish` for servers with a quorum: the aggregated gradients of each finished round."""
        return finish_rounds(self._channels(), self.transport)

    @property
    def _undoable(self) -> bool:
        """Whether the last step was committed and can be undone."""
        return bool(self.buckets) and all(channel.undoable for channel in self._channels())

    def _undo(self) -> None:
        """Leave out the last step: restore the error-feedback state from before it."""
        for channel in self._channels():
            channel.undo()
        self._set_step(self._steps_done() - 1)

    def _slots(self) -> list[Slot]:
        return [slot for bucket in self.buckets for slot in bucket.slots]

    def _channels(self, buckets: Sequence[B] | None = None) -> list[Channel]:
        return [bucket.channel for bucket in (self.buckets if buckets is None else buckets)]

    def _steps_done(self) -> int:
        """The number of the next step as an int; frameworks may count in a variable."""
        return int(self.step)

    def _set_step(self, step: int) -> None:
        self.step = step
