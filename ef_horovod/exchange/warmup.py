"""A dense warm-up: the first steps are uncompressed averages, the later ones are compressed.

The step number decides, so all ranks change in the same step, and a resumed run does too. Plain
averages leave the compressed channel's state at zero. A method with an algorithm of its own for the
dense steps (`Method.warm_up`) works on that state: `MomentumCorrection` goes on with its velocity.
"""

from __future__ import annotations

from collections.abc import Sequence

from ef_horovod.arrays import Array
from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.base import Exchange
from ef_horovod.exchange.channel import Channel, Piece, Span
from ef_horovod.exchange.dense import UNCOMPRESSED
from ef_horovod.exchange.stats import ChannelStats
from ef_horovod.methods.base import Method


def refuse_dense_steps(exchange: Exchange, dense_steps: int) -> None:
    """Raise for a dense warm-up with an exchange that cannot have one.

    Raises:
        UnsupportedError: servers reduce by one method in all steps.
    """
    if dense_steps and exchange.needs_server:
        raise UnsupportedError(
            f"got dense_steps={dense_steps} with exchange={exchange.name!r}, expected 0, because a "
            "server reduces by one method in all steps; leave dense_steps out, or take another "
            "exchange"
        )


def require_dense_steps(method: Method | None, dense_steps: int) -> None:
    """Raise if a method that learns in dense steps has none.

    Raises:
        UnsupportedError: it has none.
    """
    if method is not None and method.needs_dense_steps and not dense_steps:
        raise UnsupportedError(
            f"got {method!r} with dense_steps=0, expected some dense steps, because it learns "
            "Adam's second moment in them; pass dense_steps= of about a tenth of all steps"
        )


class WarmupChannel(Channel):
    """Two channels of one vector; the step chooses between them.

    Args:
        dense: for the first steps.
        compressed: for the later ones; its state is the one in checkpoints.
        steps: number of dense steps.
    """

    def __init__(self, dense: Channel, compressed: Channel, steps: int) -> None:
        self._dense, self._compressed, self._steps = dense, compressed, steps
        self._active = compressed
        # Otherwise the dense method works on the states of the other one, piece by piece.
        self._plain = dense.method == UNCOMPRESSED
        self.name, self.method = compressed.name, compressed.method
        self.exchange = compressed.exchange
        self.sums_before = steps if dense.sums and not compressed.sums else 0
        dense._stats = compressed._stats
        self._spans: Sequence[Span] = ()
        self._lend()

    # Both channels use one buffer, which some methods swap with a vector of their state.
    @property
    def gradient(self) -> Array:
        return self._compressed.gradient

    @gradient.setter
    def gradient(self, vector: Array) -> None:
        self._compressed.gradient = vector

    def _lend(self) -> None:
        """Give the dense channel the vectors of the compressed one."""
        self._pass_on(self._compressed, self._dense)

    def _take_back(self) -> None:
        if self._active is self._dense:
            self._pass_on(self._dense, self._compressed)

    def _pass_on(self, giver: Channel, taker: Channel) -> None:
        taker.gradient = giver.gradient
        if not self._plain:
            for mine, yours in zip(giver.pieces(), taker.pieces(), strict=True):
                given, taken = mine.channel, yours.channel
                taken.worker, taken.server = given.worker, given.server
                taken.gradient = given.gradient

    def forget(self) -> None:
        self._compressed.forget()
        self._dense._undo = None
        self._lend()

    @property
    def compressed(self) -> Channel:
        """The channel of the later steps."""
        return self._compressed

    @property
    def refused(self) -> bool:
        return self._active.refused

    def pieces(self) -> list[Piece]:
        return self._compressed.pieces()

    def start(self, step: int) -> None:
        self._active = self._dense if step < self._steps else self._compressed
        if self._active is self._dense:
            self._lend()
        self._active.measure(self._spans)
        self._spans = ()
        self._active.start(step)

    def relay(self) -> None:
        self._active.relay()

    def arrived(self) -> bool:
        return self._active.arrived()

    def agreed(self) -> bool:
        return self._active.agreed()

    def keep_undo(self) -> None:
        self._active.keep_undo()

    @property
    def undoable(self) -> bool:
        return self._active.undoable

    def undo(self) -> None:
        self._active.undo()
        self._take_back()

    def reply(self) -> None:
        self._active.reply()

    def share(self) -> None:
        self._active.share()

    def commit(self) -> Array:
        direction = self._active.commit()
        self._take_back()
        return direction

    def abandon(self) -> None:
        self._active.abandon()

    def drop(self) -> None:
        self._active.drop()

    @property
    def counters(self) -> ChannelStats:
        return self._compressed.counters

    def stats(self) -> ChannelStats:
        return self._active.stats()

    def squared_norms(self) -> tuple[float, float] | None:
        return self._active.squared_norms()

    def measured(self) -> list[tuple[float, float]]:
        return self._active.measured()
