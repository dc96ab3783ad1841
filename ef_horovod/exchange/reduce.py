"""Exchange "reduce": values are summed in flight.

It carries the payloads of linear compressors. Its cost does not grow with the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ef_horovod import wire
from ef_horovod.compressors.base import Payload
from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.base import Exchange
from ef_horovod.exchange.network import Work
from ef_horovod.exchange.registry import register_exchange
from ef_horovod.exchange.traffic import Traffic, reduce_traffic, summed_nbytes
from ef_horovod.methods.base import Method
from ef_horovod.transports.base import Transport


@register_exchange
class Reduce(Exchange):
    """An allreduce of the payloads' values; the result is one payload that stands for the sum."""

    name = "reduce"
    sums = True

    def require_fit(self, method: Method) -> None:
        if not method.allreducible:
            raise UnsupportedError(
                f"got exchange='reduce' with {method}, expected a linear compressor in a method "
                "that lets its messages be summed; use exchange='gather' or 'auto'"
            )

    def start(
        self, transport: Transport, name: str, payload: Payload, *, fixed_size: bool
    ) -> Callable[[], list[Payload]]:
        summed = Payload(payload.data.copy())
        values = summed.summands()
        # If lengths vary between steps, pad with zeros to a size class, so that shapes repeat.
        room = values if fixed_size else wire.padded_values(values)
        if payload.is_skip:
            room.fill(np.nan)  # no space for a flag, but a NaN survives every sum
        finish = transport.allreduce(name, room)

        def wait() -> list[Payload]:
            total = finish()
            if not np.all(np.isfinite(total)):
                return [payload.as_skip()]
            values[:] = total[: values.size]
            return [summed]

        return wait

    def traffic(self, method: Method, d: int, n: int) -> Traffic:
        lengths = [method.message_length(d, step) for step in (0, 1)]
        return reduce_traffic(sum(summed_nbytes(method.compressor, k) for k in lengths) / 2, n)

    def work(self, work: Work, n: int) -> tuple[float, float]:
        return work.push, work.decode + work.aggregate + work.pull
