"""Exchange "gather": every rank gets every payload.

It carries the payloads of any compressor. Its cost grows with the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable

from ef_horovod import wire
from ef_horovod.compressors.base import Payload
from ef_horovod.exchange.base import Exchange, checked
from ef_horovod.exchange.registry import register_exchange
from ef_horovod.exchange.traffic import Traffic, gather_traffic, message_nbytes
from ef_horovod.methods.base import Method
from ef_horovod.transports.base import Transport


@register_exchange
class Gather(Exchange):
    """An all-gather of payloads; every rank aggregates all of them."""

    name = "gather"

    def start(
        self, transport: Transport, name: str, payload: Payload, *, fixed_size: bool
    ) -> Callable[[], list[Payload]]:
        if fixed_size:
            finish = transport.allgather(name, payload.data)
        else:
            finish = transport.allgather(name, wire.padded(payload.data), wire.padded_nbytes)
        return lambda: [
            checked(data, rank, payload, name)
            for rank, data in zip(transport.members, finish(), strict=True)
        ]

    def traffic(self, method: Method, d: int, n: int) -> Traffic:
        return gather_traffic(message_nbytes(method, d), n)
