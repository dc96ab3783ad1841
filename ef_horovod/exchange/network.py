"""Cost parameters of an exchange: the network, the software of the collectives, and a core.

docs/cost-model.md has the formulas, the sources of the constants, and the measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ef_horovod.common.options import keep_number
from ef_horovod.common.units import read_rate, read_seconds, show_rate, show_seconds

# Ethernet frames of 1514 bytes carry 1448 bytes of TCP; 66 bytes acknowledge every second frame.
_FRAMES = (1514 + 33) / 1448


@dataclass(frozen=True)
class Network:
    """The network between the hosts, with one worker on each.

    Args:
        bandwidth: bits per second of a host's link, each way.
        latency: seconds that a short message takes from host to host.
        burst: bytes that a link carries at once after a pause, if a token bucket limits it, as on
            virtual hosts.

    Raises:
        ValueError: a field is not a finite number of at least 0, or the bandwidth is 0.

    Example:
        >>> Network.read("100mbit,2ms")
        Network(bandwidth=100000000, latency=0.002, burst=0)
        >>> str(Network.read("2.5gbit"))
        '2.5 Gbit/s, 50 us'
    """

    bandwidth: float
    latency: float = 50e-6
    burst: float = 0

    def __post_init__(self) -> None:
        keep_number(self, "bandwidth", "(0, inf)", "give bits per second, 1e9 for 1 Gbit/s")
        keep_number(self, "latency", "[0, inf)", "give seconds, 50e-6 for 50 us")
        keep_number(self, "burst", "[0, inf)", "give bytes, 0 for a link without a token bucket")

    def carry(self, nbytes: float) -> float:
        """Seconds to carry `nbytes` after a pause, at the link's full rate."""
        return 8 * _FRAMES * max(nbytes - self.burst, 0.0) / self.bandwidth

    @classmethod
    def read(cls, text: str) -> Network:
        """A network from text: a rate, optionally a comma and a latency.

        Raises:
            ValueError: the text is not a network.
        """
        rate, comma, latency = text.partition(",")
        return cls(read_rate(rate), *([read_seconds(latency)] if comma else []))

    def __str__(self) -> str:
        return f"{show_rate(self.bandwidth)}, {show_seconds(self.latency)}"


class Collective(NamedTuple):
    """How some software runs one kind of collective.

    Args:
        stretch: time of long messages divided by their time at the link's full rate.
        in_turn: number of sequential messages: "ring" is n - 1, "tree" is log2 n.
        passes: number of times these are sent: an allreduce first sums, then distributes.
        pair: the stretch between two workers, if it differs.
        ramp: bytes per round from which the stretch counts in full; below, it grows linearly.
    """

    stretch: float
    in_turn: str = "ring"
    pair: float | None = None
    ramp: float = 0.0
    passes: int = 1

    def seconds(self, sent: float, n: int, network: Network) -> float:
        """Seconds of a collective in which each of n workers sends `sent` bytes."""
        stretch = self.pair if n == 2 and self.pair is not None else self.stretch
        rounds = self.passes * (n - 1 if self.in_turn == "ring" else math.ceil(math.log2(n)))
        a_round = sent / max(rounds, 1)
        long = 1.0 if a_round >= self.ramp else a_round / self.ramp
        return rounds * network.latency + network.carry(sent) * (1 + (stretch - 1) * long)


class Software(NamedTuple):
    """The software that runs the collectives.

    Args:
        name: for reports.
        start: seconds from the call of a collective to its first byte: Horovod's cycle and
            negotiation, if each worker has a core.
        allreduce, allgather, alltoall: cost of each kind.
        core: core seconds per byte sent or received, for TCP and copies.
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
    alltoall=Collective(1.5, "ring", pair=1.0),  # queues overflow, because all send to one at once
    core=0.36e-9,
)
OPEN_MPI_RING = OPEN_MPI._replace(
    name="Horovod with Open MPI 4.1, rings chosen",
    allreduce=Collective(1.12, "ring", pair=1.15, passes=2),
    allgather=Collective(1.2, "ring", pair=1.0),
)
# An approximation of NCCL and RDMA. Only Horovod's start was measured.
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
    """Seconds of one core per element of a vector, for each part of a step.

    Args:
        push: add up, compress, keep the error.
        decode: add one payload to the mean.
        aggregate: the rest of `reduce`, with the second compression if there is one.
        pull: from the answer to the aggregated gradient.
        copy: one pass that reads and writes all numbers.
    """

    push: float
    decode: float
    aggregate: float
    pull: float
    copy: float
