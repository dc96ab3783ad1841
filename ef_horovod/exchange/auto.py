"""What `exchange="auto"` takes for a vector: a pure function of what all ranks know alike.

Nothing is measured here, for ranks, runs and hosts would measure different things: it follows from
the method, the length, the number of ranks and the network that is named. `ef-horovod advise`
measures, and tells a person.
"""

from __future__ import annotations

import warnings

from ef_horovod.compressors.identity import Identity
from ef_horovod.exchange import choice as exchanges
from ef_horovod.methods.base import Method
from ef_horovod.methods.no_feedback import NoFeedback
from ef_horovod.transports.base import Transport

USUAL_BITS_PER_SECOND = 1e9  # of a network that nobody has named
_GAIN = 0.8  # a double pass is taken if it is predicted to take less than this of the usual way
# And compression, on a network that was named, if it takes less than this of dense sums. What is
# not known here is how fast the core is and who shares it; near the break-even dense is the safer.
_SAVING = 0.6


def decide(exchange: str, method: Method, d: int, transport: Transport) -> tuple[str, Method]:
    """The exchange of a vector, and the method that it travels by: another one if it stays dense.

    Args:
        exchange: "auto", "auto:NETWORK" or one of `exchange.EXCHANGES`, which is then taken.
        method: what the vector is to be compressed by.
        d: its length.
        transport: to the other ranks.

    Raises:
        ValueError, UnsupportedError: as of `exchange.choose`.
    """
    if exchanges.is_auto(exchange) and transport.has_server:
        return "server", method
    usual = exchanges.choose(exchange, method)
    if not exchanges.is_auto(exchange) or usual == "dense" or transport.size == 1:
        return usual, method
    if not method.sized:  # nobody knows how much it will send
        return usual, method
    slices = type(transport).alltoall is not Transport.alltoall and method.sliceable
    best, pays = _best(exchange, method, d, transport.size, usual, slices=slices)
    rest = method.uncompressed() or NoFeedback(Identity())
    if pays or rest == method:
        return best, method
    if transport.rank == 0:
        warnings.warn(
            f"exchange={exchange!r} leaves gradients uncompressed where {method!r} is not "
            "predicted to be faster than dense sums; `ef-horovod advise` shows the figures, and "
            "exchange='auto' without a network always compresses",
            stacklevel=2,
        )
    return exchanges.choose("auto", rest), rest


def _best(
    exchange: str, method: Method, d: int, workers: int, usual: str, *, slices: bool
) -> tuple[str, bool]:
    """The cheapest exchange, and whether it beats dense sums, if a network was named."""
    from ef_horovod.cost.model import IDEAL, Network, step_cost

    named = exchanges.network_of(exchange)
    network = named or Network(USUAL_BITS_PER_SECOND)

    def seconds(kind: str) -> float:
        return step_cost(method, d, workers, kind, network, software=IDEAL).step

    best, least = usual, seconds(usual)
    if slices and seconds("double_pass") < _GAIN * least:
        best, least = "double_pass", seconds("double_pass")
    return best, named is None or least < _SAVING * seconds("dense")
