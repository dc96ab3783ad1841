"""How the messages of all ranks meet.

gather  every rank gets every message: for any compressor; the cost grows with the ranks
reduce  values are summed in flight: for linear compressors; the cost does not grow
dense   an allreduce of the gradient itself, without payloads
server  one message to a parameter server and one answer, which it has reduced: for any compressor
double_pass  every rank is the server of one slice: messages for slices by an all-to-all, answers by
        an all-gather; for any compressor, the cost does not grow (see double_pass.py)

"auto" is one of these by what they are predicted to take (see auto.py); "auto:10gbit" and
"auto:100mbit,2ms" say for which network, and may leave a vector uncompressed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ef_horovod import wire
from ef_horovod.compressors.base import Payload
from ef_horovod.compressors.identity import Identity
from ef_horovod.errors import PayloadError, UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.methods.no_feedback import NoFeedback
from ef_horovod.transports.base import Transport

if TYPE_CHECKING:
    from ef_horovod.cost.model import Network

EXCHANGES = ("auto", "gather", "reduce", "double_pass", "dense", "server")


def choose(exchange: str, method: Method) -> str:
    """The exchange to use, whatever the length of vectors and the number of ranks.

    Args:
        exchange: one of EXCHANGES, or "auto:NETWORK"; "auto" takes "dense" for no compression at
            all, "reduce" for linear compressors and "gather" for the others. All of these have the
            same numbers, up to the order of additions.
        method: the method that the messages belong to.

    Raises:
        ValueError: no such exchange or network.
        UnsupportedError: the method's compressor cannot travel that way.
    """
    uncompressed = method == NoFeedback(Identity())
    linear = method.summable
    if is_auto(exchange):
        network_of(exchange)
        return "dense" if uncompressed else "reduce" if linear else "gather"
    if exchange not in EXCHANGES:
        raise ValueError(
            f"got exchange={exchange!r}, expected one of {EXCHANGES}, or a network as in "
            "'auto:1gbit'; pick one"
        )
    if exchange == "reduce" and not linear:
        raise UnsupportedError(
            f"got exchange='reduce' with {method}, expected a linear compressor in a method that "
            "lets its messages be summed; use exchange='gather' or 'auto'"
        )
    if exchange == "dense" and not uncompressed:
        raise UnsupportedError(
            f"got exchange='dense' with {method}, expected NoFeedback(Identity()), for a dense "
            "exchange compresses nothing; use exchange='auto'"
        )
    if exchange == "double_pass" and not method.sliceable:
        raise UnsupportedError(
            f"got exchange='double_pass' with {method}, expected a method that works on a slice of "
            "a vector as on any other, for this one looks at whole matrices; use exchange='auto'"
        )
    return exchange


def is_auto(exchange: str) -> bool:
    """Whether it is to be found out which exchange is best."""
    return exchange == "auto" or exchange.startswith("auto:")


def network_of(exchange: str) -> Network | None:
    """The network that "auto:NETWORK" names; None for another exchange.

    Raises:
        ValueError: it is none.
    """
    _, colon, text = exchange.partition(":")
    if not colon:
        return None
    from ef_horovod.cost.model import Network

    return Network.read(text)


def start(
    exchange: str, transport: Transport, name: str, payload: Payload, *, sized: bool = True
) -> Callable[[], list[Payload]]:
    """Send a payload on its way by "gather" or "reduce".

    Args:
        exchange: one of the two.
        transport: to the other ranks.
        name: of the collective.
        payload: this rank's.
        sized: whether all ranks' payloads are as long as this one; see `Method.sized`.

    Returns:
        A function that waits and gives one payload for each rank in rank order, or a single one
        that stands for their sum. If any rank asked to drop the step, at least one `is_skip`.
    """
    if exchange == "reduce":
        return _start_reduce(transport, name, payload, sized)
    if sized:
        finish = transport.allgather(name, payload.data)
    else:
        finish = transport.allgather(name, wire.padded(payload.data), wire.padded_nbytes)
    return lambda: [checked(data, rank, payload, name) for rank, data in enumerate(finish())]


def _start_reduce(
    transport: Transport, name: str, payload: Payload, sized: bool
) -> Callable[[], list[Payload]]:
    summed = Payload(payload.data.copy())
    values = summed.summands()
    # Where lengths vary from step to step: zeros up to a size class, so that most shapes were seen.
    room = values if sized else wire.padded_values(values)
    if payload.is_skip:
        room.fill(np.nan)  # there is no room for a flag, but a NaN survives every sum
    finish = transport.allreduce(name, room)

    def wait() -> list[Payload]:
        total = finish()
        if not np.all(np.isfinite(total)):
            return [payload.as_skip()]
        values[:] = total[: values.size]
        return [summed]

    return wait


def checked(data: np.ndarray, rank: int, own: Payload, name: str) -> Payload:
    """The payload at the start of what a rank sent.

    Args:
        data: uint8[m].
        rank: who sent it.
        own: this rank's, which it has to be like.
        name: of the collective.

    Raises:
        PayloadError: it is none, or of another kind or length.
    """
    received = Payload.from_start(data)
    if received.kind is not own.kind or received.num_elements != own.num_elements:
        raise PayloadError(
            f"rank {rank} sent {received} in '{name}', expected one like {own}; "
            "use the same config and the same model on all ranks"
        )
    return received
