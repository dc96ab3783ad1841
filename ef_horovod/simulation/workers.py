"""The simulated workers of this process: each has the channel of a job, and one thread runs all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ef_horovod.arrays import Array, namespace
from ef_horovod.errors import NonFiniteError, UnsupportedError
from ef_horovod.exchange.base import Exchange
from ef_horovod.exchange.channel import Channel, conclude, settle
from ef_horovod.exchange.warmup import WarmupChannel, refuse_dense_steps, require_dense_steps
from ef_horovod.methods.base import Method
from ef_horovod.simulation.endpoints import RankWorker, ServedWorker
from ef_horovod.training.choice import Choice, choose
from ef_horovod.transports.base import Transport
from ef_horovod.transports.local import LocalTransport, local_group


def choice_of(
    exchange: str, method: Method, transport: Transport | None, dense_steps: int
) -> Choice:
    """The exchange of simulated workers, with method and dense steps.

    Raises:
        UnsupportedError: it does not fit the method or the transport, or names a network.
        ValueError: no such exchange.
    """
    if exchange.startswith("auto:"):
        raise UnsupportedError(
            f"simulate got exchange={exchange!r}, expected one without a network, because no time "
            "passes on one here; write exchange='auto', or the name that `ef-horovod advise` shows"
        )
    kind = choose(exchange, method)
    if transport is not None and kind.needs_server:
        raise UnsupportedError(
            f"got exchange={exchange!r} with a transport, expected none, for its ranks talk among "
            "each other; leave transport= out, or start a job by launch/server"
        )
    if transport is not None and kind.has_answers:
        raise UnsupportedError(
            f"got exchange={exchange!r} with a transport, expected none, because each worker has a "
            "slice here, and ranks may share workers; leave transport= out"
        )
    if transport is not None and kind.by_node:
        raise UnsupportedError(
            f"got exchange={exchange!r} with a transport, expected none, because nodes are "
            "pretended here, and ranks may share workers; leave transport= out"
        )
    if kind.needs_server and kind.by_node:
        raise UnsupportedError(
            f"simulate got exchange={exchange!r}, expected 'hierarchical', which has the same "
            "iterates, because the simulated server hears single workers; write "
            "exchange='hierarchical'"
        )
    refuse_dense_steps(kind, dense_steps)
    require_dense_steps(method, dense_steps)
    return Choice(kind, method, dense_steps)


class SimulatedWorkers:
    """The workers in this process.

    Args:
        choice: exchange between the workers, error-feedback method and dense steps.
        x: float32[d], like the vectors to exchange.
        workers: number of workers in all processes.
        seed: of random compressors.
        name: of the vector.
        transport: to the other ranks of an MPI job, which share the workers; None for no others.
        per_node: workers on a node.

    Raises:
        ValueError: fewer workers than ranks.
    """

    def __init__(
        self,
        choice: Choice,
        x: Array,
        workers: int,
        *,
        seed: int,
        name: str,
        transport: Transport | None,
        per_node: int = 1,
    ) -> None:
        self._xp, self._transport = namespace(x), transport
        self._served = choice.exchange.needs_server
        self._ends: list[LocalTransport]
        if self._served:
            self._ends = ServedWorker.group(choice.method, x, workers, seed=seed, name=name)
        elif transport is None:
            nodes = [worker // per_node for worker in range(workers)]
            self._ends = local_group(workers, one_thread=True, nodes=nodes)
            choice = choice._replace(exchange=choice.exchange.on(self._ends[0], choice.method))
        else:
            self._ends = RankWorker.group(transport, workers)
        self._by_node = choice.exchange.by_node
        self._channels = self._open(choice, name, x, seed)
        first = choice.warm_up()
        if first is not None:
            dense = self._open(first, name, x, seed)
            self._channels = [
                WarmupChannel(one, other, choice.dense_steps)
                for one, other in zip(dense, self._channels, strict=True)
            ]

    def _open(self, choice: Choice, name: str, x: Array, seed: int) -> list[Channel]:
        exchange, method, _ = choice
        if type(exchange).open is not Exchange.open:
            return [exchange.open(name, x, method, end, seed=seed) for end in self._ends]
        channels: list[Channel] = []
        for end in self._ends:
            first = channels[:1]
            channels.append(_Together(name, x, method, end, exchange, seed=seed, first=first))
        return channels

    @property
    def ranks(self) -> list[int]:
        """The workers in this process."""
        return [end.rank for end in self._ends]

    def step(self, estimates: Iterable[Array], step: int) -> Array:
        """The aggregated gradient, float32[d], of one vector per worker of this process.

        Raises:
            NonFiniteError: a vector or the sum is not finite; names the step.
        """
        for channel, own in zip(self._channels, estimates, strict=True):
            self._xp.assign(channel.gradient, own)
            channel.start(step)
        try:
            if settle(self._channels):
                directions = conclude(self._channels, good=True)
                assert directions is not None
                return directions[0]
        except NonFiniteError:  # the sum of finite messages can overflow
            pass
        raise self._not_finite(step)

    def _not_finite(self, step: int) -> NonFiniteError:
        for channel, end in zip(self._channels, self._ends, strict=True):
            # Other ranks cannot name the worker, and a node's sum is of several.
            if channel.refused and self._transport is None and not self._by_node:
                return NonFiniteError(
                    f"worker {end.rank}, step {step}: got a gradient, or one plus error-feedback "
                    "state, with a NaN or an infinity, expected finite numbers; lower step_size"
                )
        return NonFiniteError(
            f"step {step}: the workers' messages have no finite sum, expected finite numbers; "
            "lower step_size"
        )

    @property
    def states(self) -> list[Any]:
        """Each worker's state; if the exchange cuts vectors into slices, a list of each slice's.

        Empty for a worker without a slice.
        """
        all_pieces = [channel.pieces() for channel in self._channels]
        return [
            pieces[0].channel.worker
            if pieces and not pieces[0].name
            else [piece.channel.worker for piece in pieces]
            for pieces in all_pieces
        ]

    @property
    def bytes_sent(self) -> int:
        """Mean over workers; by this one if each rank has one."""
        first, n = self._ends[0], self._ends[0].size
        if self._transport is None:
            levels = [end.levels() for end in self._ends] if self._by_node else []
            between = [one.cross.bytes_sent for one in levels if one and one.cross]
            return (sum(end.bytes_sent for end in self._ends) + sum(between)) // n
        if self._transport.size == n:
            return first.bytes_sent
        # A byte that the first worker received was sent n - 1 times.
        return ((n - 1) * first.bytes_received + first.bytes_sent) // n

    @property
    def bytes_received(self) -> int:
        """Likewise."""
        if self._served:
            return sum(end.bytes_received for end in self._ends) // len(self._ends)
        return self.bytes_sent  # mean over workers: every byte sent reaches another worker


class _Together(Channel):
    """A channel in one process with others that receive the same messages.

    The first one receives and reduces for all; a job's ranks each do so for themselves.
    """

    def __init__(self, *args: Any, first: list[Channel], **options: Any) -> None:
        self._first: Any = first[0] if first else self
        super().__init__(*args, **options)

    def _open(self, seed: int) -> tuple[Any, Any]:
        worker, server = super()._open(seed)
        return worker, server if self._first is self else None

    def arrived(self) -> bool:
        if self._first is self:
            self._good = super().arrived()
        self._finish = None
        return self._first._good

    def _aggregate(self) -> Any:
        if self._first is self:
            self._sum = super()._aggregate()
        return self._first._sum
