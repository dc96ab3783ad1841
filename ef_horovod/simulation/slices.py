"""`ef.simulate(exchange="double_pass")`: the channels of a job, all in one thread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ef_horovod.arrays import Array, namespace
from ef_horovod.errors import NonFiniteError, UnsupportedError
from ef_horovod.exchange.base import Exchange
from ef_horovod.methods.base import Method
from ef_horovod.transports.base import Transport
from ef_horovod.transports.local import local_group


class SlicedWorkers:
    """Workers that each aggregate one slice, on the channels of a job."""

    def __init__(
        self,
        exchange: Exchange,
        method: Method,
        x: Array,
        workers: int,
        seed: int,
        name: str,
        transport: Transport | None,
    ) -> None:
        if transport is not None:
            raise UnsupportedError(
                f"got exchange={exchange.name!r} with a transport, expected none, because each "
                "worker has a slice here, and ranks may share workers; leave transport= out"
            )
        self.mine = range(workers)
        self._ends = local_group(workers)
        self._channels = [exchange.open(name, x, method, end, seed=seed) for end in self._ends]

    def step(self, estimates: Sequence[Array], step: int) -> Array:
        """The aggregated gradient, float32[d]."""
        for rank, (channel, own) in enumerate(zip(self._channels, estimates, strict=True)):
            xp = namespace(own)
            if not math.isfinite(xp.abs_max(own)):
                raise NonFiniteError(
                    f"worker {rank}, step {step}: got a gradient with a NaN or an infinity, "
                    "expected finite numbers; lower step_size"
                )
            xp.assign(channel.gradient, own)
            channel.start(step)
        if not all([channel.arrived() for channel in self._channels]):
            raise NonFiniteError(
                f"step {step}: what a worker compresses is not finite any more, expected finite "
                "numbers; lower step_size"
            )
        for channel in self._channels:
            channel.reply()
        direction, *_ = [channel.commit() for channel in self._channels]
        return direction

    @property
    def states(self) -> list[Any]:
        return [[piece.channel.worker for piece in c.pieces()] for c in self._channels]

    @property
    def bytes_sent(self) -> int:
        return sum(end.bytes_sent for end in self._ends) // len(self._ends)

    @property
    def bytes_received(self) -> int:
        return self.bytes_sent  # mean over workers: every byte sent reaches another worker
