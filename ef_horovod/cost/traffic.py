"""Bytes per worker and step of each way to exchange messages among n workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ef_horovod.compressors.base import Compressor
from ef_horovod.compressors.identity import Identity
from ef_horovod.compressors.topk import TopK
from ef_horovod.methods.base import Method

EXCHANGES = ("gather", "reduce", "double_pass", "server", "dense")


class Traffic(NamedTuple):
    """Bytes of one step that the algorithms hand to the network, before its own headers."""

    sent: float  # by each worker
    received: float  # by each worker
    busiest: float  # through the busiest node in its busier direction, a server's included


def gather_traffic(payload_nbytes: float, n: int) -> Traffic:
    """Every payload goes to every other worker: (n - 1) payloads sent and received.

    Args:
        payload_nbytes: size of one message, `compressor.nbytes(d)`.
        n: number of workers.

    Raises:
        ValueError: n < 1 or a negative size.

    Example:
        >>> import ef_horovod as ef
        >>> ef.cost.gather_traffic(100, n=5)
        Traffic(sent=400, received=400, busiest=400)
    """
    _require(n, payload_nbytes)
    sent = (n - 1) * payload_nbytes
    return Traffic(sent, sent, sent)


def reduce_traffic(summed_nbytes: float, n: int) -> Traffic:
    """A ring sums m bytes in flight: 2 (n - 1) / n m sent and received.

    Args:
        summed_nbytes: size of the numbers that are summed, `payload.summands().nbytes`.
        n: number of workers.

    Raises:
        ValueError: n < 1 or a negative size.

    Example:
        >>> import ef_horovod as ef
        >>> ef.cost.reduce_traffic(100, n=4)
        Traffic(sent=150.0, received=150.0, busiest=150.0)

    References:
        Patarasuk, Yuan: Bandwidth Optimal All-reduce Algorithms (2009).
    """
    _require(n, summed_nbytes)
    sent = 2 * (n - 1) * summed_nbytes / n
    return Traffic(sent, sent, sent)


def double_pass_traffic(up_nbytes: float, down_nbytes: float, n: int) -> Traffic:
    """All-to-all of slices, then an all-gather of the reduced and again compressed slices.

    Each worker sends n - 1 slices up and its own slice down to n - 1 others.

    Args:
        up_nbytes: size of the message for one slice of ceil(d / n) elements.
        down_nbytes: the same for the second pass.
        n: number of workers.

    Raises:
        ValueError: n < 1 or a negative size.

    Example:
        >>> import ef_horovod as ef
        >>> ef.cost.double_pass_traffic(10, 10, n=4)
        Traffic(sent=60, received=60, busiest=60)

    References:
        Tang et al.: DoubleSqueeze (ICML 2019), in the form without a server of DeepSpeed's 1-bit
        Adam.
    """
    _require(n, up_nbytes, down_nbytes)
    sent = (n - 1) * (up_nbytes + down_nbytes)
    return Traffic(sent, sent, sent)


def server_traffic(up_nbytes: float, down_nbytes: float, n: int) -> Traffic:
    """A parameter server on a node of its own: one message up, one down for each worker.

    Args:
        up_nbytes: size of a worker's message.
        down_nbytes: size of the server's, 4 d if it does not compress.
        n: number of workers, without the server.

    Raises:
        ValueError: n < 1 or a negative size.

    Example:
        >>> import ef_horovod as ef
        >>> ef.cost.server_traffic(10, 40, n=4)
        Traffic(sent=10, received=40, busiest=160)

    References:
        Tang et al.: DoubleSqueeze (ICML 2019).
    """
    _require(n, up_nbytes, down_nbytes)
    return Traffic(up_nbytes, down_nbytes, n * max(up_nbytes, down_nbytes))


def dense_traffic(d: int, n: int) -> Traffic:
    """A ring allreduce of d float32 numbers: what compression has to beat.

    Args:
        d: number of elements.
        n: number of workers.

    Raises:
        ValueError: n < 1 or d < 0.

    Example:
        >>> import ef_horovod as ef
        >>> ef.cost.dense_traffic(100, n=4)
        Traffic(sent=600.0, received=600.0, busiest=600.0)
    """
    return reduce_traffic(4 * d, n)


def traffic(compressor: Compressor, d: int, n: int, exchange: str) -> Traffic:
    """Traffic of a compressor's real payloads, headers and index codes included.

    Args:
        compressor: for "double_pass" and "server" of both passes. A fixed k stays k in each slice
            of a double pass.
        d: number of elements.
        n: number of workers.
        exchange: "gather", "reduce", "double_pass", "server" or "dense" (the compressor is then
            not used).

    Raises:
        ValueError: no such exchange, n < 1 or d < 0, or "reduce" with a compressor whose payloads
            cannot be summed, or one whose payload sizes follow from the data.

    Example:
        >>> import ef_horovod as ef
        >>> [round(ef.cost.traffic(ef.OneBit(), 10**6, n, "gather").sent) for n in (2, 64)]
        [125020, 7876260]
        >>> [round(ef.cost.traffic(ef.OneBit(), 10**6, n, "double_pass").sent) for n in (2, 64)]
        [125040, 248724]
    """
    _require(n, d)
    if exchange == "dense":
        return dense_traffic(d, n)
    if exchange == "gather":
        return gather_traffic(_nbytes(compressor, d), n)
    if exchange == "server":
        return server_traffic(_nbytes(compressor, d), _nbytes(compressor, d), n)
    if exchange == "double_pass":
        size = _nbytes(compressor, -(-d // n))
        return double_pass_traffic(size, size, n)
    if exchange == "reduce" and compressor.linear:
        return reduce_traffic(_summed_nbytes(compressor, d), n)
    raise ValueError(
        f"got exchange={exchange!r} with {compressor}, expected one of {EXCHANGES}, and 'reduce' "
        "only with a linear compressor; take 'gather' for any"
    )


def method_traffic(method: Method, d: int, n: int, exchange: str) -> Traffic:
    """Traffic of a method's messages and answers, as its `stats()` count them.

    For methods whose messages differ from step to step the mean over two steps. A server's own
    headers (40 bytes a message) are not in it.

    Args:
        method: with the shapes it asks for, if it does (`Method.for_shapes`).
        d: number of elements.
        n: number of workers.
        exchange: "gather", "reduce", "double_pass", "server" or "dense".

    Raises:
        ValueError: no such exchange, n < 1 or d < 0, an exchange that the method cannot take, or
            messages whose sizes follow from the data.

    Example:
        >>> import ef_horovod as ef
        >>> both = ef.DoubleSqueeze(ef.OneBit(), down=ef.OneBit())
        >>> ef.cost.method_traffic(both, 10**6, 4, "double_pass").sent
        187620.0
        >>> ef.cost.method_traffic(ef.EF21(ef.TopK(0.01)), 10**6, 4, "double_pass").sent
        3037824.0
    """
    _require(n, d)
    if exchange == "dense":
        return dense_traffic(d, n)
    if not method.sized:
        _nbytes(method.compressor, d)
        raise ValueError(
            f"got {method}, some of whose messages are empty, expected messages of known sizes; "
            "give the average size that a run sent to gather_traffic and its like"
        )
    if exchange == "gather":
        return gather_traffic(_message_nbytes(method, d), n)
    if exchange == "server":
        return server_traffic(_message_nbytes(method, d), _answer_nbytes(method, d), n)
    if exchange == "double_pass" and method.sliceable:
        part = -(-d // n)
        answer = _down(method) or Identity()  # of a header and numbers
        return double_pass_traffic(_message_nbytes(method, part), _nbytes(answer, part), n)
    if exchange == "reduce" and method.summable:
        lengths = [method.message_length(d, step) for step in (0, 1)]
        return reduce_traffic(sum(_summed_nbytes(method.compressor, k) for k in lengths) / 2, n)
    raise ValueError(
        f"got exchange={exchange!r} with {method}, expected one of {EXCHANGES}, 'reduce' only with "
        "messages that may be summed, and 'double_pass' only with vectors that may be cut; take "
        "'gather' for any"
    )


def break_even_ranks(compressor: Compressor, d: int) -> float:
    """A gather sends fewer bytes than a dense ring for fewer workers than this: 8 d / nbytes(d).

    (n - 1) payloads against 2 (n - 1) / n times 4 d bytes.

    Args:
        compressor: whose payloads are gathered.
        d: number of elements, at least 1.

    Raises:
        ValueError: d < 1, or the payload's size follows from the data.

    Example:
        >>> import ef_horovod as ef
        >>> round(ef.cost.break_even_ranks(ef.OneBit(), 10**7), 2)
        64.0
        >>> round(ef.cost.break_even_ranks(ef.TopK(ratio=0.01), 10**7))
        159
    """
    if d < 1:
        raise ValueError(f"got d={d}, expected at least one element")
    return 8 * d / _nbytes(compressor, d)


def break_even_density(
    d: int, n: int, sparsifier: Callable[[int], Compressor] | None = None
) -> float:
    """The largest density k / d at which a gather sends fewer bytes than a dense ring.

    With 8 bytes an entry it would be 1 / n; the index code of `TopK` allows more.

    Args:
        d: number of elements, at least 1.
        n: number of workers, at least 2.
        sparsifier: sparsifier(k) is a compressor that keeps k entries and whose payload grows with
            k; None for `TopK(k=k)`.

    Returns:
        The density, 0 if not even one entry pays.

    Raises:
        ValueError: d < 1 or n < 2, or the payload's size follows from the data.

    Example:
        >>> import ef_horovod as ef
        >>> ef.cost.break_even_density(10**6, n=16)
        0.109151
    """
    if d < 1 or n < 2:
        raise ValueError(
            f"got d={d} and n={n}, expected at least one element and two workers; one worker sends "
            "nothing in any case"
        )
    make = sparsifier or (lambda k: TopK(k=k))
    pays, pays_not = 0, d + 1
    while pays_not - pays > 1:
        k = (pays + pays_not) // 2
        if n * _nbytes(make(k), d) < 8 * d:
            pays = k
        else:
            pays_not = k
    return pays / d


def _nbytes(compressor: Compressor, d: int) -> int:
    if not compressor.sized:  # its nbytes() is that of an empty payload
        raise ValueError(
            f"got {compressor}, expected a compressor whose payload size follows from d alone; "
            "give the average size that a run sent to gather_traffic and its like"
        )
    return compressor.nbytes(d)


def _down(method: Method) -> Compressor | None:
    """What a method's answers are compressed with."""
    down = getattr(method, "down", None)
    return down if isinstance(down, Compressor) else None


def _message_nbytes(method: Method, d: int) -> float:
    lengths = [method.message_length(d, step) for step in (0, 1)]
    return sum(_nbytes(method.compressor, length) for length in lengths) / 2


def _answer_nbytes(method: Method, d: int) -> int:
    """Of a server: numbers without a payload's header, where it does not compress."""
    down = _down(method)
    return 4 * d if down is None else _nbytes(down, d)


def _summed_nbytes(compressor: Compressor, d: int) -> int:
    _nbytes(compressor, d)  # refuses sizes that are not known
    # A payload of the real size; x has the right shape and takes no memory.
    return compressor.skip(np.broadcast_to(np.float32(0), d)).summands().nbytes


def _require(n: int, *sizes: float) -> None:
    if n < 1 or any(size < 0 for size in sizes):
        raise ValueError(
            f"got n={n} and sizes {sizes}, expected at least one worker and sizes of at least 0"
        )
