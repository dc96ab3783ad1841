"""Counters of channels, and contexts that count."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from ef_horovod.transports.base import Transport


@dataclass
class ChannelStats:
    """Counters of a channel; see `Channel.stats`."""

    name: str
    num_elements: int
    method: str
    exchange: str
    steps: int = 0
    skipped: int = 0  # steps dropped because some rank's gradient was not finite
    dense_bytes_out: int = 0  # as a float32 ring allreduce would have sent
    bytes_out: int = 0
    bytes_in: int = 0
    seconds_compress: float = 0.0
    seconds_wait: float = 0.0
    seconds_decompress: float = 0.0
    relative_error: float = math.nan  # ||x - C(x)|| / ||x|| at the last step

    @property
    def ratio(self) -> float:
        """Bytes sent divided by the bytes of a dense allreduce; smaller is better."""
        return self.bytes_out / self.dense_bytes_out if self.dense_bytes_out else math.nan


def total_stats(parts: list[ChannelStats]) -> ChannelStats:
    """The sum over channels, as one row named "total"; its error is the root mean square."""
    total = ChannelStats("total", 0, "", "")
    for part in parts:
        for counter in (
            "num_elements",
            "dense_bytes_out",
            "bytes_out",
            "bytes_in",
            "seconds_compress",
            "seconds_wait",
            "seconds_decompress",
        ):
            setattr(total, counter, getattr(total, counter) + getattr(part, counter))
        total.steps = max(total.steps, part.steps)
        total.skipped = max(total.skipped, part.skipped)
    errors = [part.relative_error for part in parts if not math.isnan(part.relative_error)]
    if errors:
        total.relative_error = float(np.sqrt(np.mean(np.square(errors))))
    return total


class Timed:
    """Context that adds its seconds to a counter; cheaper than a generator."""

    def __init__(self, stats: ChannelStats, counter: str) -> None:
        self._stats, self._counter = stats, counter

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        elapsed = time.perf_counter() - self._begin
        setattr(self._stats, self._counter, getattr(self._stats, self._counter) + elapsed)


class Counted:
    """Context that adds the bytes that a transport moves in it."""

    def __init__(self, stats: ChannelStats, transport: Transport) -> None:
        self._stats, self._transport = stats, transport

    def __enter__(self) -> None:
        self._before = self._transport.bytes_sent, self._transport.bytes_received

    def __exit__(self, *error: object) -> None:
        sent, received = self._before
        self._stats.bytes_out += self._transport.bytes_sent - sent
        self._stats.bytes_in += self._transport.bytes_received - received
