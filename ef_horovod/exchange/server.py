"""Exchange "server": one payload to a parameter server, and one reduced answer back.

It carries the payloads of any compressor. If the server was started with a quorum, its rounds do
not wait for all workers, and a step returns the answers of several rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ef_horovod.arrays import Array
from ef_horovod.compressors.base import Payload
from ef_horovod.exchange.base import Exchange
from ef_horovod.exchange.channel import Channel
from ef_horovod.exchange.network import Network, Software
from ef_horovod.exchange.registry import register_exchange
from ef_horovod.exchange.traffic import Traffic, answer_nbytes, message_nbytes, server_traffic
from ef_horovod.methods.base import Method
from ef_horovod.methods.parsing import write_method
from ef_horovod.transports.base import Answer, Transport


@register_exchange
class ParameterServer(Exchange):
    """Workers send payloads; a server on a separate machine reduces and answers."""

    name = "server"
    needs_server = True

    def open(
        self, name: str, like: Array, method: Method, transport: Transport, *, seed: int = 0
    ) -> Channel:
        return ServerChannel(name, like, method, transport, self, seed=seed)

    def traffic(self, method: Method, d: int, n: int) -> Traffic:
        return server_traffic(message_nbytes(method, d), answer_nbytes(method, d), n)

    def seconds(
        self, method: Method, d: int, n: int, moved: Traffic, network: Network, software: Software
    ) -> float:
        link = network.carry(n * moved.sent) + network.carry(n * moved.received)
        return 2 * network.latency + link  # an answer comes after the last message

    def node_sent(
        self, method: Method, d: int, n: int, moved: Traffic, network: Network, software: Software
    ) -> float:
        return network.workers_per_node * moved.sent


class ServerChannel(Channel):
    """A channel with the worker's state; the server has the aggregator's state."""

    def _open(self, seed: int) -> tuple[Any, Any]:
        worker, _ = self.method.init(self.gradient, self._transport.size)
        length = self.gradient.shape[0]
        self._transport.open_bucket(self.name, length, write_method(self.method), seed)
        return worker, None

    def forget(self) -> None:
        raise AssertionError(f"the servers keep a half of {self.name}")

    def _send(self, message: Payload, step: int) -> Callable[[], Any]:
        return self._transport.ask(self.name, message.data, step)

    def _aggregate(self) -> Array | Payload:
        (answer,) = self._received
        return self._read(answer)

    def commit_rounds(self, later: Sequence[Answer] = ()) -> list[Array]:
        """`commit` for a quorum: one aggregated gradient per round.

        A round without a result has zeros. If this rank's gradient was not finite, it sent no
        gradient, and its state is unchanged.

        Args:
            later: answers of rounds after the one that includes this rank's payload.
        """
        directions = []
        with self._timed("seconds_decompress"):
            for answer in [*self._received, *later]:
                direction = self._xp.zeros(self._stats.num_elements, self._device)
                if not answer.is_skip:
                    self._xp.assign(direction, self._direction_of(answer))
                directions.append(direction)
        self._received = self._pushed = None
        self._stats.steps += len(directions)
        return directions

    def _direction_of(self, answer: Answer) -> Array:
        aggregate = self._read(answer)
        if not answer.counted or self._pushed is None:
            return self.method.listen(self.worker, aggregate)
        return self._pull(aggregate)

    def _read(self, answer: Answer) -> Array | Payload:
        if answer.payload is not None:
            return Payload(answer.payload)
        assert answer.numbers is not None  # a skip is not read
        return self._xp.from_host(answer.numbers, self._device)


def finish_rounds(channels: Sequence[Channel], transport: Transport) -> list[list[Array]]:
    """`finish_step` for a quorum: the aggregated gradients of each round.

    See `ServerChannel.commit_rounds`. The result includes rounds that ended in the meantime, so
    that the next gradient is computed at a newer model.
    """
    for channel in channels:
        channel.arrived()
    later = transport.catch_up([channel.name for channel in channels])
    parts = []
    for channel, answers in zip(channels, later, strict=True):
        assert isinstance(channel, ServerChannel)
        parts.append(channel.commit_rounds(answers))
    return [list(of_round) for of_round in zip(*parts, strict=True)]
