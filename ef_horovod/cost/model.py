"""Seconds per training step for each exchange: a model of the network, its software and a core.

A step is: forward and backward; compress; the collectives; decode and apply. The model has no
overlap. So it is an upper bound if buckets are sent during backward, both dense and compressed.
docs/cost-model.md has the formulas, the sources of the constants, and the measurements.
"""

from __future__ import annotations

from typing import NamedTuple

from ef_horovod.common.options import number
from ef_horovod.cost.traffic import method_traffic
from ef_horovod.exchange.dense import UNCOMPRESSED
from ef_horovod.exchange.hierarchical import Hierarchical, between_nodes
from ef_horovod.exchange.network import OPEN_MPI, Network, Software, Work
from ef_horovod.exchange.registry import exchange_of
from ef_horovod.exchange.traffic import Traffic, reduce_traffic, require_counts
from ef_horovod.methods.base import Method


def reference_work(method: Method, d: int) -> Work:
    """Fixed core speeds: round numbers near the measurements in docs/cost-model.md.

    `exchange="auto"` uses them, because it has to choose the same on all ranks and in all runs.
    They hold for error feedback with top-k or one bit. Decoding takes 2 ns per byte, at most 2.5 ns
    per element.

    Example:
        >>> import ef_horovod as ef
        >>> reference_work(ef.EF21(ef.TopK(0.01)), 10**6).decode < 2e-10
        True
    """
    density = method.compressor.nbytes(method.message_length(d, 0)) / max(d, 1)
    decode = min(2e-9 * density, 2.5e-9)
    return Work(push=1.5e-9, decode=decode, aggregate=1.0e-9, pull=0.5e-9, copy=0.4e-9)


class Cost(NamedTuple):
    """Seconds and bytes per step; bytes are per worker."""

    exchange: str
    traffic: Traffic
    compute: float  # forward and backward
    compress: float
    network: float  # all collectives of the step
    decode: float
    node_sent: float  # bytes from a node with all its workers to the other nodes

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
    """Predicted cost of a step with one bucket.

    Args:
        method: error-feedback method; ignored for "dense".
        d: number of elements.
        n: number of workers, on `n / network.workers_per_node` nodes.
        exchange: name of a registered exchange, such as "gather", "dense" or "hierarchical:gather".
        network: between the nodes, and within one.
        software: that runs the collectives.
        work: speeds of a core; default `reference_work`.
        compute: seconds of forward and backward.
        share: workers per core, if more than 1.

    Raises:
        ValueError: as in `method_traffic`; a time or `share` is negative or not finite, `share`
            is 0, or nodes would be unequal.

    Example:
        >>> import ef_horovod as ef
        >>> slow = ef.cost.Network(bandwidth=100e6)
        >>> costs = [ef.cost.step_cost(ef.EF21(ef.TopK(0.01)), 3_600_000, 4, kind, slow)
        ...          for kind in ("dense", "gather")]
        >>> costs[0].step > 10 * costs[1].step
        True
    """
    _require_times(compute, share, work)
    require_counts(d, n)
    if exchange.partition(":")[0] == Hierarchical.name:
        inner = exchange_of(exchange).inner(method)  # type: ignore[attr-defined]
        r = network.workers_per_node
        if r > 1 and (r != n or inner.needs_server):
            return _two_levels(inner.name, method, d, n, network, software, work, compute, share)
        exchange = inner.name
    network.nodes(n)
    moved, way = method_traffic(method, d, n, exchange), exchange_of(exchange)
    before, after = (d * share * s for s in way.work(work or reference_work(method, d), n))
    software = software._replace(start=share * software.start)
    parts = (method, d, n, moved, network, software)
    sends = n > 1 or way.needs_server
    seconds, node_sent = (way.seconds(*parts), way.node_sent(*parts)) if sends else (0.0, 0.0)
    on_core = share * software.core * (moved.sent + moved.received)
    return Cost(exchange, moved, compute, before, max(seconds, on_core), after, node_sent)


def _two_levels(
    inner: str,
    method: Method,
    d: int,
    n: int,
    network: Network,
    software: Software,
    work: Work | None,
    compute: float,
    share: float,
) -> Cost:
    """Sum within the node, exchange slices between nodes, gather slices within the node."""
    r, nodes = network.workers_per_node, network.nodes(n)
    work = work or reference_work(method, d)
    between = step_cost(
        method, -(-d // r), nodes, inner, network.of_one_slice(), software=software, work=work,
        compute=compute, share=share,
    )  # fmt: skip
    start, copying = share * software.start, share * d * work.copy
    within = 3 * start + 2 * network.carry_within(4 * d * (r - 1) / r)  # sums, flags, slices
    return Cost(
        f"{Hierarchical.name}:{inner}",
        between.traffic,
        compute,
        between.compress + copying,
        between.network + within,
        between.decode + copying,
        r * between.node_sent,
    )


def half_precision_cost(
    d: int, n: int, network: Network, *, software: Software = OPEN_MPI,
    work: Work | None = None, compute: float = 0.0, share: float = 1.0,
) -> Cost:  # fmt: skip
    """The same for Horovod's `Compression.fp16`: an allreduce of 2 d bytes, and two casts.

    A cast moves three quarters of the bytes of a copy.

    Raises:
        ValueError: n is no whole number from 1 on, or d none from 0 on; times as in `step_cost`.
    """
    _require_times(compute, share, work)
    require_counts(d, n)
    network.nodes(n)
    moved = reduce_traffic(2 * d, n)
    sums = software.allreduce.seconds(moved.sent, n, network) if n > 1 else 0.0
    seconds = share * software.start + sums if n > 1 else 0.0
    cast = 0.75 * d * share * (work or reference_work(UNCOMPRESSED, d)).copy
    on_core = share * software.core * (moved.sent + moved.received)
    through = software.allreduce.node_sent(moved.sent, n, network.workers_per_node)
    return Cost("fp16", moved, compute, cast, max(seconds, on_core), cast, through)


def _require_times(compute: float, share: float, work: Work | None) -> None:
    number("ef.cost", "compute", compute, "[0, inf)", "give seconds, 0.06 for 60 ms")
    number("ef.cost", "share", share, "(0, inf)", "give the workers per core, 1 for one")
    for name, seconds in work._asdict().items() if work else ():
        number("Work", name, seconds, "[0, inf)", "give seconds per element")


def possible_exchanges(method: Method, workers_per_node: int = 1) -> list[str]:
    """The exchanges between ranks that a method can use, except "dense".

    Example:
        >>> import ef_horovod as ef
        >>> possible_exchanges(ef.EF21(ef.TopK(0.01)), workers_per_node=4)
        ['gather', 'double_pass', 'hierarchical:gather', 'hierarchical:double_pass']
    """
    if method == UNCOMPRESSED:
        return []
    ways = between_nodes()
    if workers_per_node > 1:
        ways += [Hierarchical(way) for way in ways]
    return [way.name for way in ways if way.fits(method)]
