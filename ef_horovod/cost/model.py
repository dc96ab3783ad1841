"""Seconds of one training step by each exchange: a model of a network, its software and a core.

A step is: forward and backward; compress; the collectives; decode and apply. Nothing overlaps in
it, so it is an upper bound where buckets are sent during backward, for dense as for compressed
ones. docs/cost-model.md has the formulas, where the constants come from, and what was measured.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ef_horovod.common.units import read_rate, read_seconds, show_rate, show_seconds
from ef_horovod.compressors.identity import Identity
from ef_horovod.cost.traffic import Traffic, method_traffic, reduce_traffic
from ef_horovod.methods.base import Method
from ef_horovod.methods.no_feedback import NoFeedback

# Ethernet frames of 1514 bytes carry 1448 of TCP; every second one is acknowledged by 66 bytes.
_FRAMES = (1514 + 33) / 1448


class Network(NamedTuple):
    """What lies between the hosts; one worker on each.

    Args:
        bandwidth: bits per second of a host's link, each way.
        latency: seconds that a short message takes from host to host.
        burst: bytes that a link carries at once after a pause, where a token bucket limits it, as
            on virtual hosts.

    Example:
        >>> Network.read("100mbit,2ms")
        Network(bandwidth=100000000, latency=0.002, burst=0)
        >>> str(Network.read("2.5gbit"))
        '2.5 Gbit/s, 50 us'
    """

    bandwidth: float
    latency: float = 50e-6
    burst: float = 0

    def carry(self, nbytes: float) -> float:
        """Seconds of so many bytes, after a pause, at the link's full rate."""
        return 8 * _FRAMES * max(nbytes - self.burst, 0.0) / self.bandwidth

    @classmethod
    def read(cls, text: str) -> Network:
        """A network from text: a rate, and after a comma a latency.

        Raises:
            ValueError: it is none.
        """
        rate, comma, latency = text.partition(",")
        return cls(read_rate(rate), *([read_seconds(latency)] if comma else []))

    def __str__(self) -> str:
        return f"{show_rate(self.bandwidth)}, {show_seconds(self.latency)}"


class Collective(NamedTuple):
    """How some software makes one kind of collective.

    Args:
        stretch: seconds of long messages over what their bytes take at the link's full rate.
        in_turn: messages that wait for each other: "ring" is n - 1 of them, "tree" log2 n.
        passes: how often that is gone through: a sum is first made, then spread.
        pair: the stretch between two workers, where it is another one.
        ramp: bytes a round from which the stretch counts in full; it grows up to there.
    """

    stretch: float
    in_turn: str = "ring"
    pair: float | None = None
    ramp: float = 0.0
    passes: int = 1

    def seconds(self, sent: float, n: int, network: Network) -> float:
        """Of a collective in which each of n workers sends so many bytes."""
        stretch = self.pair if n == 2 and self.pair is not None else self.stretch
        rounds = self.passes * (n - 1 if self.in_turn == "ring" else math.ceil(math.log2(n)))
        a_round = sent / max(rounds, 1)
        long = 1.0 if a_round >= self.ramp else a_round / self.ramp
        return rounds * network.latency + network.carry(sent) * (1 + (stretch - 1) * long)


class Software(NamedTuple):
    """What carries out the collectives.

    Args:
        name: what to call it.
        start: seconds from asking for a collective to its first byte: Horovod's cycle and
            negotiation, where each worker has a core.
        allreduce, allgather, alltoall: how it makes them.
        core: seconds of a core for each byte that is sent and received: TCP's and copies.
    """

    name: str
    start: float
    allreduce: Collective
    allgather: Collective
    alltoall: Collective
    core: float


OPEN_MPI = Software(
    "Horovod with Open MPI 4.1 as it comes",
    start=2.5e-3,
    allreduce=Collective(1.85, "tree", pair=1.22, ramp=32e3, passes=2),
    allgather=Collective(1.5, "ring", pair=1.0, ramp=100e3),
    alltoall=Collective(1.5, "ring", pair=1.0),  # all send to one at once: queues overflow
    core=0.36e-9,
)
OPEN_MPI_RING = OPEN_MPI._replace(
    name="Horovod with Open MPI 4.1, rings chosen",
    allreduce=Collective(1.12, "ring", pair=1.15, passes=2),
    allgather=Collective(1.2, "ring", pair=1.0),
)
# As NCCL and RDMA come near it. Nothing here was measured but Horovod's start.
IDEAL = Software(
    "Horovod with rings at the link's full rate that take no core (RDMA; not measured)",
    start=OPEN_MPI.start,
    allreduce=Collective(1.0, "ring", passes=2),
    allgather=Collective(1.0, "ring"),
    alltoall=Collective(1.0, "ring"),
    core=0.0,
)
SOFTWARE = {"default": OPEN_MPI, "ring": OPEN_MPI_RING, "ideal": IDEAL}


class Work(NamedTuple):
    """Seconds of one core for each element of a vector, of a method's parts.

    Args:
        push: add up, compress, keep the error.
        decode: add one message to the mean.
        aggregate: the rest of `reduce`; the second compression, where there is one.
        pull: from the answer to the direction.
        copy: one pass that reads and writes all numbers.
    """

    push: float
    decode: float
    aggregate: float
    pull: float
    copy: float


def reference_work(method: Method, d: int) -> Work:
    """Speeds of a core that were not measured: round numbers near those of docs/cost-model.md.

    `exchange="auto"` takes them, for it has to choose alike on all ranks and in all runs. They are
    those of error feedback with top-k or one bit; a message is decoded in 2 ns a byte, up to
    2.5 ns an element.

    Example:
        >>> import ef_horovod as ef
        >>> reference_work(ef.EF21(ef.TopK(0.01)), 10**6).decode < 2e-10
        True
    """
    density = method.compressor.nbytes(method.message_length(d, 0)) / max(d, 1)
    decode = min(2e-9 * density, 2.5e-9)
    return Work(push=1.5e-9, decode=decode, aggregate=1.0e-9, pull=0.5e-9, copy=0.4e-9)


class Cost(NamedTuple):
    """Seconds and bytes of a step; bytes are a worker's."""

    exchange: str
    traffic: Traffic
    compute: float  # forward and backward
    compress: float
    network: float  # all collectives of the step
    decode: float

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.compress + self.network + self.decode


def step_cost(
    method: Method,
    d: int,
    n: int,
    exchange: str,
    network: Network,
    *,
    software: Software = OPEN_MPI,
    work: Work | None = None,
    compute: float = 0.0,
    share: float = 1.0,
) -> Cost:
    """What a step of one bucket is predicted to take.

    Args:
        method: what is compressed how; of no meaning for "dense".
        d: number of elements.
        n: number of workers, each on a host of its own.
        exchange: "gather", "reduce", "double_pass", "server" or "dense".
        network: between the hosts.
        software: what carries out the collectives.
        work: speeds of a core; default `reference_work`.
        compute: seconds of forward and backward.
        share: workers for each core, if that is more than 1.

    Raises:
        ValueError: as of `method_traffic`.

    Example:
        >>> import ef_horovod as ef
        >>> slow = ef.cost.Network(bandwidth=100e6)
        >>> costs = [ef.cost.step_cost(ef.EF21(ef.TopK(0.01)), 3_600_000, 4, kind, slow)
        ...          for kind in ("dense", "gather")]
        >>> costs[0].step > 10 * costs[1].step
        True
    """
    moved = method_traffic(method, d, n, exchange)
    before, after = (
        d * share * part for part in _work(work or reference_work(method, d), n, exchange)
    )
    software = software._replace(start=share * software.start)
    seconds = _collectives(method, d, n, exchange, moved, network, software) if n > 1 else 0.0
    on_core = share * software.core * (moved.sent + moved.received)
    return Cost(exchange, moved, compute, before, max(seconds, on_core), after)


def half_precision_cost(
    d: int, n: int, network: Network, *, software: Software = OPEN_MPI,
    work: Work | None = None, compute: float = 0.0, share: float = 1.0,
) -> Cost:  # fmt: skip
    """The same for Horovod's own `Compression.fp16`: an allreduce of 2 d bytes, and two casts.

    A cast moves three quarters of what a copy does.

    Raises:
        ValueError: n < 1 or d < 0.
    """
    moved = reduce_traffic(2 * d, n)
    sums = software.allreduce.seconds(moved.sent, n, network) if n > 1 else 0.0
    seconds = share * software.start + sums if n > 1 else 0.0
    cast = 0.75 * d * share * (work or reference_work(NoFeedback(Identity()), d)).copy
    on_core = share * software.core * (moved.sent + moved.received)
    return Cost("fp16", moved, compute, cast, max(seconds, on_core), cast)


def possible_exchanges(method: Method) -> list[str]:
    """The exchanges among workers that a method can take, without "dense"."""
    if method == NoFeedback(Identity()):
        return []
    return [
        "gather",
        *(["reduce"] if method.summable else []),
        *(["double_pass"] if method.sliceable else []),
    ]


def _work(work: Work, n: int, exchange: str) -> tuple[float, float]:
    """Seconds for each element before and after the exchange, on the busiest path."""
    if exchange == "dense":
        return 0.0, work.copy
    if exchange == "double_pass":  # the messages of all for a slice are as long as one for all
        # A copy into slices and one out of them, of memory that no cache holds: two passes each.
        before, after = work.push + 2 * work.copy, work.decode + work.aggregate / n
        return before, after + work.pull + 2 * work.copy
    messages = 1 if exchange == "reduce" else n
    return work.push, messages * work.decode + work.aggregate + work.pull


def _collectives(
    method: Method,
    d: int,
    n: int,
    exchange: str,
    moved: Traffic,
    network: Network,
    software: Software,
) -> float:
    if exchange in ("dense", "reduce"):
        return software.start + software.allreduce.seconds(moved.sent, n, network)
    if exchange == "gather":
        return software.start + software.allgather.seconds(moved.sent, n, network)
    if exchange == "server":  # an answer comes after the last message
        link = network.carry(n * moved.sent) + network.carry(n * moved.received)
        return 2 * network.latency + link
    up = (n - 1) * method.compressor.nbytes(-(-d // n))
    down = moved.sent - up
    there = software.start + software.alltoall.seconds(up, n, network)
    return there + software.start + software.allgather.seconds(down, n, network)
