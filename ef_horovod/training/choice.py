"""Chooses the exchange and the method of a vector.

`exchange=` is the name of an exchange, or "auto", which chooses by predicted time. "auto:10gbit"
and "auto:100mbit,2ms" also name the network; they may leave a vector uncompressed.

Nothing is measured, because measurements would differ between ranks, runs and hosts. The choice
depends only on the method, the length, the numbers of ranks and nodes and the named network.
`ef-horovod advise` measures and reports to the user.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import NamedTuple

from ef_horovod.arrays import Array
from ef_horovod.cost.model import step_cost
from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.base import Exchange
from ef_horovod.exchange.channel import Channel
from ef_horovod.exchange.dense import UNCOMPRESSED
from ef_horovod.exchange.hierarchical import Hierarchical, levels_of
from ef_horovod.exchange.network import IDEAL, Network
from ef_horovod.exchange.registry import EXCHANGES, exchange_of, usual_exchange
from ef_horovod.exchange.warmup import WarmupChannel, refuse_dense_steps
from ef_horovod.methods.base import Method
from ef_horovod.transports.base import Transport

USUAL_BITS_PER_SECOND = 1e9  # if no network is named
# Rings, except that gathers send to all ranks, as Open MPI's do by default.
_SOFTWARE = IDEAL._replace(allgather=IDEAL.allgather._replace(to_next=False))
_GAIN = 0.8  # a double pass is used if its predicted time is below this part of the usual exchange
# On a named network, compression is used if its predicted time is below this part of a dense
# allreduce. The core's speed and load are unknown here; near the break-even, dense is safer.
_SAVING = 0.6


class Choice(NamedTuple):
    """A vector's exchange and method, and how many dense steps come first."""

    exchange: Exchange
    method: Method
    dense_steps: int = 0

    def open(self, name: str, like: Array, transport: Transport, *, seed: int = 0) -> Channel:
        """The vector's channel; arguments as in `Channel`."""
        channel = self.exchange.open(name, like, self.method, transport, seed=seed)
        first = self.warm_up(in_graph=transport.fixed_collectives)
        if first is None:
            return channel
        dense = first.open(name, like, transport, seed=seed)
        return WarmupChannel(dense, channel, self.dense_steps)

    def warm_up(self, *, in_graph: bool = False) -> Choice | None:
        """Exchange and method of the dense steps, None if there are none; see `in_dense_steps`."""
        method = self.method.warm_up() or UNCOMPRESSED
        if not self.dense_steps or method == self.method:
            return None
        # A double pass of uncompressed slices sends as much as a dense ring.
        same = self.exchange.in_dense_steps(method, in_graph=in_graph)
        return Choice(same or choose("auto", method), method)


def open_channel(
    name: str,
    like: Array,
    method: Method,
    transport: Transport,
    *,
    exchange: str = "auto",
    seed: int = 0,
    dense_steps: int = 0,
) -> Channel:
    """The channel for a vector; other arguments as in `Channel`.

    Args:
        exchange: as users write it. With "auto:NETWORK" the channel may not compress; see its
            `stats()`.
        dense_steps: as in `decide`.
    """
    choice = decide(exchange, method, like.shape[0], transport, dense_steps)
    return choice.open(name, like, transport, seed=seed)


def is_auto(exchange: str) -> bool:
    """Whether `exchange` is "auto" or "auto:NETWORK"."""
    return exchange == "auto" or exchange.startswith("auto:")


def network_of(exchange: str) -> Network | None:
    """The network in "auto:NETWORK"; None for another exchange.

    Raises:
        ValueError: NETWORK is not a network.
    """
    _, colon, text = exchange.partition(":")
    try:
        return Network.read(text) if colon else None
    except ValueError as error:
        raise ValueError(
            f"got exchange={exchange!r}, expected a network after 'auto:', as in 'auto:1gbit' or "
            f"'auto:100mbit,2ms'; {error}"
        ) from None


def wants_server(exchange: str) -> bool:
    """Whether the exchange needs a job with parameter servers."""
    try:
        return not is_auto(exchange) and exchange_of(exchange).needs_server
    except ValueError:  # others say so
        return False


def choose(exchange: str, method: Method) -> Exchange:
    """The usual exchange of a method, for any vector length and number of ranks.

    Args:
        exchange: name of an exchange, "auto" or "auto:NETWORK". "auto" takes "dense" without
            compression, "reduce" for linear compressors and "gather" for the others. All of these
            give the same numbers, up to the order of additions.
        method: of the payloads.

    Raises:
        ValueError: no such exchange or network.
        UnsupportedError: the exchange cannot carry the method's payloads.

    Example:
        >>> import ef_horovod as ef
        >>> choose("auto", ef.EF21(ef.TopK(0.01))).name
        'gather'
    """
    if is_auto(exchange):
        network_of(exchange)
        return EXCHANGES["dense"] if method == UNCOMPRESSED else usual_exchange(method)
    found = exchange_of(exchange)
    found.require_fit(method)
    return found


def decide(
    exchange: str, method: Method | None, d: int, transport: Transport, dense_steps: int = 0
) -> Choice:
    """The exchange and the method of a vector; another method if it stays uncompressed.

    Args:
        exchange: as users write it.
        method: the requested method; None to leave the vector uncompressed.
        d: length of the vector.
        transport: to the other ranks.
        dense_steps: how many steps are uncompressed averages before compression starts. The
            predicted time is that of the later steps.

    Raises:
        ValueError, UnsupportedError: as in `choose`, or dense steps with a server.
    """
    if transport.has_server and (is_auto(exchange) or method is None):
        exchange = exchange if wants_server(exchange) else "server"
    if method is None:
        dense = exchange_of(exchange if wants_server(exchange) else "dense")
        return Choice(dense.on(transport, UNCOMPRESSED), UNCOMPRESSED)
    usual = _named(exchange, method, d, transport)
    refuse_dense_steps(usual, dense_steps)
    if not is_auto(exchange) or not usual.compresses or transport.size == 1:
        return Choice(usual, method, dense_steps)
    if not method.fixed_size:  # bytes are unknown
        return Choice(usual, method, dense_steps)
    best, pays = _best(exchange, method, d, transport, usual)
    rest = method.uncompressed() or UNCOMPRESSED
    if pays or rest == method:
        return Choice(best, method, dense_steps)
    if transport.rank == 0:
        warnings.warn(
            f"exchange={exchange!r} leaves gradients uncompressed where {method!r} is not "
            "predicted to be faster than dense sums; `ef-horovod advise` shows the figures, and "
            "exchange='auto' without a network always compresses",
            stacklevel=2,
        )
    return Choice(choose("auto", rest), rest)


def _named(exchange: str, method: Method, d: int, transport: Transport) -> Exchange:
    """The exchange that users named, with one between nodes; the usual one for "auto"."""
    found = choose(exchange, method)
    if isinstance(found, Hierarchical) and not found.has_inner:
        levels = levels_of(transport, exchange)
        n, length = transport.size, d
        if levels is not None:
            n, length = round(n / levels.per_node), -(-d // levels.slices)
        if method.fixed_size:
            network = Network(USUAL_BITS_PER_SECOND / (levels.slices if levels else 1))
            found = Hierarchical(_cheapest(method, length, n, network, transport)[0])
    return found.on(transport, method)


def _best(
    exchange: str, method: Method, d: int, transport: Transport, usual: Exchange
) -> tuple[Exchange, bool]:
    """The cheapest exchange, and whether to compress: always true without a named network."""
    named, r = network_of(exchange), transport.ranks_per_node
    network = replace(named or Network(USUAL_BITS_PER_SECOND), workers_per_node=r)
    n = transport.size
    best, least = _cheapest(method, d, n, network, transport)
    by_node = Hierarchical(usual)
    if r > 1 and by_node.fits(method):
        slices = network.of_one_slice()
        by_node = Hierarchical(_cheapest(method, -(-d // r), n // r, slices, transport)[0])
        seconds = _seconds(method, d, n, by_node.name, network)
        if seconds < least and _has_levels(transport, exchange):
            best, least = by_node, seconds
    return best, named is None or least < _SAVING * _seconds(method, d, n, "dense", network)


def _cheapest(
    method: Method, d: int, n: int, network: Network, transport: Transport
) -> tuple[Exchange, float]:
    """The usual exchange or a double pass, whichever is cheaper among n ranks, and its seconds."""
    best = usual_exchange(method)
    least = _seconds(method, d, n, best.name, network)
    double = EXCHANGES["double_pass"]
    if type(transport).alltoall is not Transport.alltoall and double.fits(method):
        seconds = _seconds(method, d, n, double.name, network)
        if seconds < _GAIN * least:
            best, least = double, seconds
    return best, least


def _seconds(method: Method, d: int, n: int, exchange: str, network: Network) -> float:
    return step_cost(method, d, n, exchange, network, software=_SOFTWARE).step


def _has_levels(transport: Transport, exchange: str) -> bool:
    """Whether the groups of ranks that a two-level exchange needs can be made; equal on all ranks.

    If not, rank 0 says so once.
    """
    try:
        return levels_of(transport, exchange) is not None
    except UnsupportedError:
        pass
    if transport.rank == 0:
        warnings.warn(
            f"exchange={exchange!r} sends between all {transport.size} ranks, although "
            f"{transport.ranks_per_node} ranks share a node's network interface, expected groups "
            "of ranks to sum within a node first; write hvd.init(process_sets='dynamic'), or name "
            "an exchange",
            stacklevel=2,
        )
    return False
