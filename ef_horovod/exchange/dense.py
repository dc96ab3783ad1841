"""Exchange "dense": an allreduce of the gradient itself, without payloads."""

from __future__ import annotations

from typing import Any

from ef_horovod.arrays import Array
from ef_horovod.compressors.identity import Identity
from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.base import Exchange
from ef_horovod.exchange.channel import Channel
from ef_horovod.exchange.network import Work
from ef_horovod.exchange.registry import register_exchange
from ef_horovod.exchange.traffic import Traffic, dense_traffic
from ef_horovod.methods.base import Method
from ef_horovod.methods.no_feedback import NoFeedback
from ef_horovod.transports.base import Transport

UNCOMPRESSED = NoFeedback(Identity())


@register_exchange
class Dense(Exchange):
    """An allreduce of the gradient itself: plain data-parallel averaging."""

    name = "dense"
    compresses = False
    sums = True

    def require_fit(self, method: Method) -> None:
        if method != UNCOMPRESSED:
            raise UnsupportedError(
                f"got exchange='dense' with {method}, expected NoFeedback(Identity()), because a "
                "dense exchange compresses nothing; use exchange='auto'"
            )

    def open(
        self, name: str, like: Array, method: Method, transport: Transport, *, seed: int = 0
    ) -> Channel:
        return DenseChannel(name, like, method, transport, self, seed=seed)

    def traffic(self, method: Method, d: int, n: int) -> Traffic:
        return dense_traffic(d, n)

    def work(self, work: Work, n: int) -> tuple[float, float]:
        return 0.0, work.copy


class DenseChannel(Channel):
    """A channel without error-feedback state; gradients are summed in its own vector."""

    def _open(self, seed: int) -> tuple[Any, Any]:
        return None, None

    def start(self, step: int) -> None:
        self._begin()
        with self._counted():
            self._finish = self._transport.allreduce(self.name, self.gradient)

    def arrived(self) -> bool:
        total = self._wait()
        with self._timed("seconds_decompress"):
            # Into `gradient`, because the received tensor may be immutable. In the same pass as the
            # division, the check for finite numbers is free.
            size, mean = self._transport.size, self.gradient
            return bool(self._xp.divide_checked(total, size, out=mean))

    def commit(self) -> Array:
        self._stats.steps += 1
        return self.gradient  # the mean, since `arrived`
