"""Base class of exchanges: how ranks exchange payloads, which methods fit, and the cost.

A new exchange is one file, here or in your own package that all ranks import:

    @register_exchange
    class Ring(Exchange):
        name = "ring"
        def start(self, transport, name, payload, *, fixed_size): ...
        def traffic(self, method, d, n): ...

Users write `exchange="ring"`. This is enough for an exchange with a single collective. Others
override `open` to return another kind of channel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from ef_horovod.arrays import Array
from ef_horovod.compressors.base import Payload
from ef_horovod.errors import PayloadError, UnsupportedError
from ef_horovod.exchange.channel import Channel
from ef_horovod.exchange.network import Collective, Network, Software, Work
from ef_horovod.exchange.traffic import Traffic
from ef_horovod.methods.base import Method
from ef_horovod.transports.base import Transport


class Exchange(ABC):
    """One way to exchange payloads, without state; see the module."""

    name: str  # as users write it
    compresses: ClassVar[bool] = True  # False: the gradient itself is sent, without payloads
    sums: ClassVar[bool] = False  # float32 values are summed in flight; False: bytes are sent
    has_answers: ClassVar[bool] = False  # a second collective brings answers, `Channel.answers`
    needs_server: bool = False
    by_node: ClassVar[bool] = False  # its channels know the ranks of a node: `Transport.levels`

    def require_fit(self, method: Method) -> None:  # noqa: B027 - most carry every method
        """Raise if this exchange cannot carry a method's payloads.

        Raises:
            UnsupportedError: with a way out.
        """

    def fits(self, method: Method) -> bool:
        """Whether this exchange can carry a method's payloads."""
        try:
            self.require_fit(method)
        except UnsupportedError:
            return False
        return True

    def with_inner(self, name: str) -> Exchange:
        """The exchange that users write as "THIS:NAME", with another one inside.

        Raises:
            ValueError: this one has none inside, or not that one.
        """
        raise ValueError(
            f"got exchange='{self.name}:{name}', expected {self.name!r}, which has no other "
            "exchange inside; leave the rest out"
        )

    def on(self, transport: Transport, method: Method) -> Exchange:
        """The exchange that a method gets over a transport; the first call may be collective.

        Raises:
            UnsupportedError: this one cannot work there; with a way out.
        """
        return self

    def in_dense_steps(self, method: Method, *, in_graph: bool = False) -> Exchange | None:
        """For dense steps by a method on the same states, cut alike; None: the usual one.

        Args:
            method: of the dense steps.
            in_graph: whether all steps have to have the same collectives, but for sums.
        """
        return self if self.has_answers else None

    def open(
        self, name: str, like: Array, method: Method, transport: Transport, *, seed: int = 0
    ) -> Channel:
        """A channel for one vector; arguments as in `Channel`."""
        return Channel(name, like, method, transport, self, seed=seed)

    def start(
        self, transport: Transport, name: str, payload: Payload, *, fixed_size: bool
    ) -> Callable[[], list[Payload]]:
        """Start to exchange a payload.

        Args:
            transport: to the other ranks.
            name: of the collective.
            payload: this rank's.
            fixed_size: whether all ranks' payloads are as long as this one: `Method.fixed_size`.

        Returns:
            A function that waits and returns one payload per rank in rank order, or a single
            payload that stands for their sum. If any rank asked to drop the step, at least one
            payload `is_skip`.
        """
        raise NotImplementedError(f"the channels of exchange {self.name!r} send by themselves")

    def send(
        self, transport: Transport, name: str, payload: Payload, *, fixed_size: bool
    ) -> Callable[[], list[Payload]]:
        """`start`, with its result checked: a missing payload would train on in silence.

        Raises:
            UnsupportedError: `start` returned something else than it should; at the wait, too.
        """
        wait = self.start(transport, name, payload, fixed_size=fixed_size)
        if not callable(wait):
            raise self._broken(name, wait, "a function that waits for the payloads")
        return lambda: self._complete(name, wait(), transport.size)

    def _complete(self, name: str, received: Any, size: int) -> list[Payload]:
        counts = {1, size} if self.sums else {size}
        if not isinstance(received, list) or not all(isinstance(p, Payload) for p in received):
            raise self._broken(name, received, "a list of payloads from the function that waits")
        if len(received) not in counts:
            raise self._broken(
                name,
                f"{len(received)} payload(s)",
                f"{size}, one per rank{', or one that stands for their sum' * self.sums}",
            )
        return received

    def _broken(self, name: str, found: Any, expected: str) -> UnsupportedError:
        kind, where = type(self), f" for '{name}'" if name else ""
        return UnsupportedError(
            f"exchange {self.name!r} returned {str(found)[:80]}{where}, expected {expected}; "
            f"correct `start` of {kind.__module__}.{kind.__qualname__}"
        )

    @abstractmethod
    def traffic(self, method: Method, d: int, n: int) -> Traffic:
        """Bytes per step.

        Args:
            method: one that fits, with payloads of known sizes.
            d: number of elements.
            n: number of workers.

        Raises:
            ValueError: n < 1 or d < 0, or sizes that depend on the data.
        """

    def work(self, work: Work, n: int) -> tuple[float, float]:
        """Core seconds per element before and after the exchange, on the busiest path."""
        return work.push, n * work.decode + work.aggregate + work.pull

    def collectives(
        self, method: Method, d: int, n: int, moved: Traffic, software: Software
    ) -> list[tuple[Collective, float]]:
        """A step's collectives among n >= 2 workers, each with the bytes that a worker sends in it.

        Args:
            method, d, n: as in `traffic`.
            moved: the result of `traffic`.
            software: that runs the collectives.
        """
        return [(software.allreduce if self.sums else software.allgather, moved.sent)]

    def seconds(
        self, method: Method, d: int, n: int, moved: Traffic, network: Network, software: Software
    ) -> float:
        """Seconds of `collectives`, one after the other, over a network between the workers."""
        parts = self.collectives(method, d, n, moved, software)
        return sum(software.start + part.seconds(sent, n, network) for part, sent in parts)

    def node_sent(
        self, method: Method, d: int, n: int, moved: Traffic, network: Network, software: Software
    ) -> float:
        """Bytes that a node with all its workers sends to other nodes."""
        parts = self.collectives(method, d, n, moved, software)
        return sum(part.node_sent(sent, n, network.workers_per_node) for part, sent in parts)


def checked(data: np.ndarray, rank: int, own: Payload, name: str) -> Payload:
    """The payload at the start of a rank's received bytes.

    Args:
        data: uint8[m].
        rank: the sender.
        own: this rank's payload; the received one must have the same kind and length.
        name: of the collective.

    Raises:
        PayloadError: not a payload, or of another kind or length.
    """
    received = Payload.from_start(data)
    if received.kind is not own.kind or received.num_elements != own.num_elements:
        raise PayloadError(
            f"rank {rank} sent {received} in '{name}', expected one like {own}; "
            "use the same config and the same model on all ranks"
        )
    return received
