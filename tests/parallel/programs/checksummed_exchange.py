"""An exchange from outside the package, in one file: a gather whose messages carry a checksum.

Ranks import it and write `exchange="checksummed"`; nothing of the package knows it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from ef_horovod import wire
from ef_horovod.compressors.base import Payload
from ef_horovod.errors import PayloadError
from ef_horovod.exchange.base import Exchange, checked
from ef_horovod.exchange.registry import register_exchange
from ef_horovod.exchange.traffic import Traffic, gather_traffic, message_nbytes
from ef_horovod.methods.base import Method
from ef_horovod.transports.base import Transport

SUM_NBYTES = 4


@register_exchange
class Checksummed(Exchange):
    """An all-gather of payloads, each behind the CRC-32 of its bytes."""

    name = "checksummed"

    def start(
        self, transport: Transport, name: str, payload: Payload, *, fixed_size: bool
    ) -> Callable[[], list[Payload]]:
        data = payload.data if fixed_size else wire.padded(payload.data)
        message = np.concatenate([_checksum(data), data])
        finish = transport.allgather(name, message, None if fixed_size else _length)
        return lambda: [
            checked(_verified(received, rank), rank, payload, name)
            for rank, received in enumerate(finish())
        ]

    def traffic(self, method: Method, d: int, n: int) -> Traffic:
        return gather_traffic(SUM_NBYTES + message_nbytes(method, d), n)


def _length(message: np.ndarray) -> int:
    return SUM_NBYTES + wire.padded_nbytes(message[SUM_NBYTES:])


def _verified(message: np.ndarray, rank: int) -> np.ndarray:
    data = message[SUM_NBYTES:]
    if not np.array_equal(_checksum(data), message[:SUM_NBYTES]):
        raise PayloadError(f"rank {rank} sent bytes whose checksum differs, expected them whole")
    return data


def _checksum(data: np.ndarray) -> np.ndarray:
    return np.array([zlib.crc32(data.tobytes())], "<u4").view(np.uint8)
