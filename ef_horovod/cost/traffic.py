"""Bytes per step by name of the exchange, and break-even points with a dense allreduce."""

from __future__ import annotations

from collections.abc import Callable

from ef_horovod.common.options import choice
from ef_horovod.compressors.base import Compressor
from ef_horovod.compressors.topk import TopK
from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.base import Exchange
from ef_horovod.exchange.registry import EXCHANGES
from ef_horovod.exchange.traffic import Traffic, fixed_nbytes, require_counts
from ef_horovod.methods.base import Method
from ef_horovod.methods.no_feedback import NoFeedback

_WAY_OUT = (
    "name one (`stats()` shows which one 'auto' took), or import the module that registers it"
)


def traffic(compressor: Compressor, d: int, n: int, exchange: str) -> Traffic:
    """Traffic of a compressor's real payloads, headers and index codes included.

    Args:
        compressor: of both passes for "double_pass" and "server". A fixed k stays k in each slice
            of a double pass.
        d: number of elements.
        n: number of workers.
        exchange: name of a registered exchange, such as "gather"; "dense" ignores the compressor.

    Raises:
        ValueError: no such exchange ("auto" is none), n is no whole number from 1 on or d none from
            0 on, "reduce" with a compressor whose payloads cannot be summed, or payload sizes that
            depend on the data.

    Example:
        >>> import ef_horovod as ef
        >>> [round(ef.cost.traffic(ef.OneBit(), 10**6, n, "gather").sent) for n in (2, 64)]
        [125020, 7876260]
        >>> [round(ef.cost.traffic(ef.OneBit(), 10**6, n, "double_pass").sent) for n in (2, 64)]
        [125040, 248724]
    """
    return method_traffic(NoFeedback(compressor, server_compressor=compressor), d, n, exchange)


def method_traffic(method: Method, d: int, n: int, exchange: str) -> Traffic:
    """Traffic of a method's payloads and answers, as counted by `stats()`.

    If payload sizes differ between steps, the mean over two steps. A server's headers (40 bytes per
    message) are not included.

    Args:
        method: with its shapes, if it needs them (`Method.for_shapes`).
        d: number of elements.
        n: number of workers.
        exchange: name of a registered exchange, such as "gather" or "dense".

    Raises:
        ValueError: no such exchange ("auto" is none), n is no whole number from 1 on or d none from
            0 on, an exchange that the method cannot use, or payload sizes that depend on the data.

    Example:
        >>> import ef_horovod as ef
        >>> both = ef.DoubleSqueeze(ef.OneBit(), server_compressor=ef.OneBit())
        >>> ef.cost.method_traffic(both, 10**6, 4, "double_pass").sent
        187620.0
        >>> ef.cost.method_traffic(ef.EF21(ef.TopK(0.01)), 10**6, 4, "double_pass").sent
        3038136.0
    """
    require_counts(d, n)
    name = choice("ef.cost", "exchange", exchange, [*EXCHANGES], _WAY_OUT)
    way = EXCHANGES[name]
    if way.compresses:
        _require_known(method, d, way)
    return way.traffic(method, d, n)


def _require_known(method: Method, d: int, exchange: Exchange) -> None:
    """Raise ValueError if the bytes of a method are unknown, or the exchange cannot carry them."""
    if not method.fixed_size:
        fixed_nbytes(method.compressor, d)
        raise ValueError(
            f"got {method}, some of whose messages are empty, expected messages of known sizes; "
            "give the average size that a run sent to gather_traffic and its like"
        )
    try:
        exchange.require_fit(method)
    except UnsupportedError as error:
        raise ValueError(str(error)) from None


def break_even_ranks(compressor: Compressor, d: int) -> float:
    """Number of workers below which a gather sends less than a dense ring: 8 d / nbytes(d).

    A gather sends (n - 1) payloads, a dense ring 2 (n - 1) / n times 4 d bytes.

    Args:
        compressor: of the gathered payloads.
        d: number of elements, at least 1.

    Raises:
        ValueError: d is no whole number from 1 on, or the payload's size depends on the data.

    Example:
        >>> import ef_horovod as ef
        >>> round(ef.cost.break_even_ranks(ef.OneBit(), 10**7), 2)
        64.0
        >>> round(ef.cost.break_even_ranks(ef.TopK(ratio=0.01), 10**7))
        158
    """
    require_counts(d, 1, least=1)
    return 8 * d / fixed_nbytes(compressor, d)


def break_even_density(
    d: int, n: int, sparsifier: Callable[[int], Compressor] | None = None
) -> float:
    """The largest density k / d at which a gather sends fewer bytes than a dense ring.

    With 8 bytes per entry it would be 1 / n; the index code of `TopK` allows more.

    Args:
        d: number of elements, at least 1.
        n: number of workers, at least 2.
        sparsifier: sparsifier(k) returns a compressor that keeps k entries and whose payload grows
            with k; None for `TopK(k=k)`.

    Returns:
        The density; 0 if even one entry sends more.

    Raises:
        ValueError: d is no whole number from 1 on or n none from 2 on, or the payload's size
            depends on the data.

    Example:
        >>> import ef_horovod as ef
        >>> ef.cost.break_even_density(10**6, n=16)
        0.107634
    """
    require_counts(d, n, least=1, fewest=2)  # one worker sends nothing
    make = sparsifier or (lambda k: TopK(k=k))
    pays, pays_not = 0, d + 1
    while pays_not - pays > 1:
        k = (pays + pays_not) // 2
        if n * fixed_nbytes(make(k), d) < 8 * d:
            pays = k
        else:
            pays_not = k
    return pays / d
