"""Which exchange a vector gets, and by which method it travels: decided once, here.

`exchange=` is the name of an exchange, or "auto": one of them by what they are predicted to take.
"auto:10gbit" and "auto:100mbit,2ms" say for which network, and may leave a vector uncompressed.

Nothing is measured, because ranks, runs and hosts would measure different things: the choice
follows from the method, the length, the number of ranks and the network that is named.
`ef-horovod advise` measures, and tells a person.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

from ef_horovod.arrays import Array
from ef_horovod.cost.model import step_cost
from ef_horovod.exchange.base import Exchange
from ef_horovod.exchange.channel import Channel
from ef_horovod.exchange.dense import UNCOMPRESSED
from ef_horovod.exchange.network import IDEAL, Network
from ef_horovod.exchange.registry import EXCHANGES, exchange_of
from ef_horovod.methods.base import Method
from ef_horovod.transports.base import Transport

USUAL_BITS_PER_SECOND = 1e9  # of a network that nobody has named
_GAIN = 0.8  # a double pass is taken if it is predicted to take less than this of the usual way
# And compression, on a network that was named, if it takes less than this of dense sums. What is
# not known here is how fast the core is and who shares it; near the break-even dense is the safer.
_SAVING = 0.6


class Choice(NamedTuple):
    """What a vector travels by."""

    exchange: Exchange
    method: Method

    def open(self, name: str, like: Array, transport: Transport, *, seed: int = 0) -> Channel:
        """The vector's channel; arguments as of `Channel`."""
        return self.exchange.open(name, like, self.method, transport, seed=seed)


def open_channel(
    name: str,
    like: Array,
    method: Method,
    transport: Transport,
    *,
    exchange: str = "auto",
    seed: int = 0,
) -> Channel:
    """The channel for a vector; other arguments as of `Channel`.

    Args:
        exchange: what users write; with "auto:NETWORK" the channel may not compress. `stats()` of
            it tells.
    """
    choice = decide(exchange, method, like.shape[0], transport)
    return choice.open(name, like, transport, seed=seed)


def is_auto(exchange: str) -> bool:
    """Whether it is to be found out which exchange is best."""
    return exchange == "auto" or exchange.startswith("auto:")


def network_of(exchange: str) -> Network | None:
    """The network that "auto:NETWORK" names; None for another exchange.

    Raises:
        ValueError: it is none.
    """
    _, colon, text = exchange.partition(":")
    return Network.read(text) if colon else None


def wants_server(exchange: str) -> bool:
    """Whether a job with parameter servers is asked for, whatever it is that is exchanged."""
    return exchange in EXCHANGES and EXCHANGES[exchange].needs_server


def choose(exchange: str, method: Method) -> Exchange:
    """The exchange to use, whatever the length of vectors and the number of ranks.

    Args:
        exchange: the name of one, "auto" or "auto:NETWORK"; "auto" takes "dense" for no compression
            at all, "reduce" for linear compressors and "gather" for the others. All of these have
            the same numbers, up to the order of additions.
        method: the method that the messages belong to.

    Raises:
        ValueError: no such exchange or network.
        UnsupportedError: the method's messages cannot travel that way.

    Example:
        >>> import ef_horovod as ef
        >>> choose("auto", ef.EF21(ef.TopK(0.01))).name
        'gather'
    """
    if is_auto(exchange):
        network_of(exchange)
        usual = "reduce" if method.allreducible else "gather"
        return EXCHANGES["dense" if method == UNCOMPRESSED else usual]
    found = exchange_of(exchange)
    found.require_fit(method)
    return found


def decide(exchange: str, method: Method | None, d: int, transport: Transport) -> Choice:
    """What a vector travels by; by another method than asked for if it stays uncompressed.

    Args:
        exchange: what users write.
        method: what the vector is to be compressed by; None to leave it uncompressed.
        d: its length.
        transport: to the other ranks.

    Raises:
        ValueError, UnsupportedError: as of `choose`.
    """
    if transport.has_server and (is_auto(exchange) or method is None):
        exchange = "server"
    if method is None:
        return Choice(EXCHANGES["server" if wants_server(exchange) else "dense"], UNCOMPRESSED)
    usual = choose(exchange, method)
    if not is_auto(exchange) or not usual.compresses or transport.size == 1:
        return Choice(usual, method)
    if not method.fixed_size:  # nobody knows how much it will send
        return Choice(usual, method)
    slices = type(transport).alltoall is not Transport.alltoall
    slices = slices and EXCHANGES["double_pass"].fits(method)
    best, pays = _best(exchange, method, d, transport.size, usual, slices=slices)
    rest = method.uncompressed() or UNCOMPRESSED
    if pays or rest == method:
        return Choice(best, method)
    if transport.rank == 0:
        warnings.warn(
            f"exchange={exchange!r} leaves gradients uncompressed where {method!r} is not "
            "predicted to be faster than dense sums; `ef-horovod advise` shows the figures, and "
            "exchange='auto' without a network always compresses",
            stacklevel=2,
        )
    return Choice(choose("auto", rest), rest)


def _best(
    exchange: str, method: Method, d: int, workers: int, usual: Exchange, *, slices: bool
) -> tuple[Exchange, bool]:
    """The cheapest exchange, and whether it beats dense sums, if a network was named."""
    named = network_of(exchange)
    network = named or Network(USUAL_BITS_PER_SECOND)

    def seconds(name: str) -> float:
        return step_cost(method, d, workers, name, network, software=IDEAL).step

    best, least = usual.name, seconds(usual.name)
    if slices and seconds("double_pass") < _GAIN * least:
        best, least = "double_pass", seconds("double_pass")
    return EXCHANGES[best], named is None or least < _SAVING * seconds("dense")
