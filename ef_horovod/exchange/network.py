"""Cost parameters of an exchange: the network, the software of the collectives, and a core.

docs/cost-model.md has the formulas, the sources of the constants, and the measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from ef_horovod.common.options import keep_number, keep_whole
from ef_horovod.common.units import read_rate, read_seconds, show_rate, show_seconds

# Ethernet frames of 1514 bytes carry 1448 bytes of TCP; 66 bytes acknowledge every second frame.
_FRAMES = (1514 + 33) / 1448
# Shared memory on cores with other work, a round number; docs/cost-model.md has measurements.
WITHIN_NODE = 32e9


@dataclass(frozen=True)
class Network:
    """The network between the nodes, and the way between the workers of a node.

    Args:
        bandwidth: bits per second of a node's link, each way; its workers share it.
        latency: seconds that a short message takes from node to node.
        burst: bytes that a link carries at once after a pause, if a token bucket limits it, as on
            virtual hosts.
        workers_per_node: behind one link, equally many on each node.
        within: bits per second from one worker of a node to another, each way.

    Raises:
        ValueError: a field is not a finite number of at least 0, a bandwidth is 0, or
            `workers_per_node` is no whole number from 1 on.

    Example:
        >>> Network.read("100mbit,2ms").latency
        0.002
        >>> str(Network.read("2.5gbit"))
        '2.5 Gbit/s, 50 us'
    """

    bandwidth: float
    latency: float = 50e-6
    burst: float = 0
    workers_per_node: int = 1
    within: float = WITHIN_NODE

    def __post_init__(self) -> None:
        keep_number(self, "bandwidth", "(0, inf)", "give bits per second, 1e9 for 1 Gbit/s")
        keep_number(self, "latency", "[0, inf)", "give seconds, 50e-6 for 50 us")
        keep_number(self, "burst", "[0, inf)", "give bytes, 0 for a link without a token bucket")
        keep_whole(self, "workers_per_node", 1, None, "1 is a node for each worker")
        keep_number(self, "within", "(0, inf)", "give bits per second, 16e9 for 16 Gbit/s")

    def carry(self, nbytes: float) -> float:
        """Seconds to carry `nbytes` after a pause, at the link's full rate."""
        return 8 * _FRAMES * max(nbytes - self.burst, 0.0) / self.bandwidth

    def carry_within(self, nbytes: float) -> float:
        """Seconds to carry `nbytes` from one worker of a node to another."""
        return 8 * nbytes / self.within

    def of_one_slice(self) -> Network:
        """The same for one worker of each node, with its part of the link."""
        r = self.workers_per_node
        part = {"bandwidth": self.bandwidth / r, "burst": self.burst / r}
        return replace(self, **part, workers_per_node=1)

    def nodes(self, n: int) -> int:
        """The number of nodes of n workers.

        Raises:
            ValueError: the last node would have fewer workers.
        """
        if n % self.workers_per_node:
            raise ValueError(
                f"ef.cost got {n} workers on nodes of {self.workers_per_node}, expected equally "
                f"many on each node; take a multiple of {self.workers_per_node} workers"
            )
        return n // self.workers_per_node

    @classmethod
    def read(cls, text: str) -> Network:
        """A network from text: a rate, optionally a comma and a latency.

        Raises:
            ValueError: the text is not a network.
        """
        rate, comma, latency = text.partition(",")
        network = cls(read_rate(rate))
        return replace(network, latency=read_seconds(latency)) if comma else network

    def __str__(self) -> str:
        return f"{show_rate(self.bandwidth)}, {show_seconds(self.latency)}"


class Collective(NamedTuple):
    """How some software runs one kind of collective.

    Args:
        stretch: time of long messages divided by their time at the link's full rate.
        in_turn: number of sequential messages: "ring" is n - 1, "tree" is log2 n.
        passes: number of times these are sent: an allreduce first sums, then distributes.
        to_next: whether a worker sends to the next one alone, so that one worker of a node sends to
            other nodes. Otherwise its bytes go to all others alike.
        pair: the stretch between two workers, if it differs.
        ramp: bytes per round from which the stretch counts in full; below, it grows linearly.
    """

    stretch: float
    in_turn: str = "ring"
    pair: float | None = None
    ramp: float = 0.0
    passes: int = 1
    to_next: bool = False

    def node_sent(self, sent: float, n: int, workers_per_node: int) -> float:
        """Bytes that a node sends to others if each of n workers sends `sent` bytes.

        Example:
            >>> rings, pairs = Collective(1.0, to_next=True), Collective(1.0)
            >>> rings.node_sent(700, 8, 4), pairs.node_sent(700, 8, 4)
            (700, 1600.0)
        """
        if n == workers_per_node:
            return 0.0
        if self.to_next or workers_per_node == 1:
            return sent
        return workers_per_node * (n - workers_per_node) * sent / (n - 1)

    def seconds(self, sent: float, n: int, network: Network) -> float:
        """Seconds of a collective in which each of n workers sends `sent` bytes."""
        if n == network.workers_per_node:
            return network.carry_within(sent)
        stretch = self.pair if n == 2 and self.pair is not None else self.stretch
        rounds = self.passes * (n - 1 if self.in_turn == "ring" else math.ceil(math.log2(n)))
        a_round = sent / max(rounds, 1)
        long = 1.0 if a_round >= self.ramp else a_round / self.ramp
        through = network.carry(self.node_sent(sent, n, network.workers_per_node))
        return rounds * network.latency + through * (1 + (stretch - 1) * long)


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
    allreduce=Collective(1.12, "ring", pair=1.15, passes=2, to_next=True),
    allgather=Collective(1.2, "ring", pair=1.0, to_next=True),
)
# An approximation of NCCL and RDMA. Only Horovod's start was measured.
IDEAL = Software(
    "Horovod with rings at the link's full rate that take no core (RDMA; not measured)",
    start=OPEN_MPI.start,
    allreduce=Collective(1.0, "ring", passes=2, to_next=True),
    allgather=Collective(1.0, "ring", to_next=True),
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
