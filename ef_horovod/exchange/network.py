"""What carries an exchange: a network, the software of the collectives, and a core.

docs/cost-model.md has the formulas, where the constants come from, and what was measured.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ef_horovod.common.units import read_rate, read_seconds, show_rate, show_seconds

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
