"""Bytes per worker and step: formulas for each exchange among n workers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ef_horovod.common.options import number, whole
from ef_horovod.compressors.base import Compressor
from ef_horovod.methods.base import Method

_OWNER = "ef.cost"  # in messages


class Traffic(NamedTuple):
    """Bytes per step, without the network's headers."""

    sent: float  # by each worker
    received: float  # by each worker
    busiest: float  # through the busiest machine, server included, in its busier direction


def gather_traffic(payload_nbytes: float, n: int) -> Traffic:
    """Every payload goes to every other worker: (n - 1) payloads sent and received.

    Args:
        payload_nbytes: size of one payload, `compressor.nbytes(d)`.
        n: number of workers.

    Raises:
        ValueError: n is no whole number from 1 on, or a size is negative or not finite.

    Example:
        >>> import ef_horovod as ef
        >>> ef.cost.gather_traffic(100, n=5)
        Traffic(sent=400, received=400, busiest=400)
    """
    require_sizes(n, payload_nbytes=payload_nbytes)
    sent = (n - 1) * payload_nbytes
    return Traffic(sent, sent, sent)


def reduce_traffic(summed_nbytes: float, n: int) -> Traffic:
    """A ring allreduce of m bytes: 2 (n - 1) / n m sent and received.

    Args:
        summed_nbytes: size of the summed numbers, `payload.summands().nbytes`.
        n: number of workers.

    Raises:
        ValueError: n is no whole number from 1 on, or a size is negative or not finite.

    Example:
        >>> import ef_horovod as ef
        >>> ef.cost.reduce_traffic(100, n=4)
        Traffic(sent=150.0, received=150.0, busiest=150.0)

    References:
        Patarasuk, Yuan: Bandwidth Optimal All-reduce Algorithms (2009).
    """
    require_sizes(n, summed_nbytes=summed_nbytes)
    sent = 2 * (n - 1) * summed_nbytes / n
    return Traffic(sent, sent, sent)


def double_pass_traffic(up_nbytes: float, down_nbytes: float, n: int) -> Traffic:
    """All-to-all of slices, then an all-gather of the reduced slices, compressed again.

    Each worker sends n - 1 slices up, and its reduced slice down to the n - 1 others.

    Args:
        up_nbytes: size of the payload for one slice of ceil(d / n) elements.
        down_nbytes: the same for the second pass.
        n: number of workers.

    Raises:
        ValueError: n is no whole number from 1 on, or a size is negative or not finite.

    Example:
        >>> import ef_horovod as ef
        >>> ef.cost.double_pass_traffic(10, 10, n=4)
        Traffic(sent=60, received=60, busiest=60)

    References:
        Tang et al.: DoubleSqueeze (ICML 2019), without a server, as in DeepSpeed's 1-bit Adam.
    """
    require_sizes(n, up_nbytes=up_nbytes, down_nbytes=down_nbytes)
    sent = (n - 1) * (up_nbytes + down_nbytes)
    return Traffic(sent, sent, sent)


def server_traffic(up_nbytes: float, down_nbytes: float, n: int) -> Traffic:
    """A parameter server on a separate machine: one message up and one down per worker.

    Args:
        up_nbytes: size of a worker's message.
        down_nbytes: size of the server's message; 4 d if it does not compress.
        n: number of workers, without the server.

    Raises:
        ValueError: n is no whole number from 1 on, or a size is negative or not finite.

    Example:
        >>> import ef_horovod as ef
        >>> ef.cost.server_traffic(10, 40, n=4)
        Traffic(sent=10, received=40, busiest=160)

    References:
        Tang et al.: DoubleSqueeze (ICML 2019).
    """
    require_sizes(n, up_nbytes=up_nbytes, down_nbytes=down_nbytes)
    return Traffic(up_nbytes, down_nbytes, n * max(up_nbytes, down_nbytes))


def dense_traffic(d: int, n: int) -> Traffic:
    """A ring allreduce of d float32 numbers, the baseline without compression.

    Args:
        d: number of elements.
        n: number of workers.

    Raises:
        ValueError: n is no whole number from 1 on, or d none from 0 on.

    Example:
        >>> import ef_horovod as ef
        >>> ef.cost.dense_traffic(100, n=4)
        Traffic(sent=600.0, received=600.0, busiest=600.0)
    """
    require_counts(d, n)
    return reduce_traffic(4 * d, n)


def fixed_nbytes(compressor: Compressor, d: int) -> int:
    """Size of a payload of d elements.

    Raises:
        ValueError: the size depends on the data.
    """
    if not compressor.fixed_size:  # then nbytes() is the size of an empty payload
        raise ValueError(
            f"got {compressor}, expected a compressor whose payload size follows from d alone; "
            "give the average size that a run sent to gather_traffic and its like"
        )
    return compressor.nbytes(d)


def compressor_of_answers(method: Method) -> Compressor | None:
    """The compressor of a method's answers; None if they are not compressed."""
    down = getattr(method, "server_compressor", None)
    return down if isinstance(down, Compressor) else None


def message_nbytes(method: Method, d: int) -> float:
    """Size of a worker's payload, mean over two steps."""
    lengths = [method.message_length(d, step) for step in (0, 1)]
    return sum(fixed_nbytes(method.compressor, length) for length in lengths) / 2


def answer_nbytes(method: Method, d: int) -> int:
    """Size of a server's answer; without compression, numbers without a payload's header."""
    down = compressor_of_answers(method)
    return 4 * d if down is None else fixed_nbytes(down, d)


def summed_nbytes(compressor: Compressor, d: int) -> int:
    """Size of a payload's numbers that are summed in flight."""
    fixed_nbytes(compressor, d)  # raises for unknown sizes
    # A payload of the real size; the broadcast input takes no memory.
    return compressor.skip(np.broadcast_to(np.float32(0), d)).summands().nbytes


def require_counts(d: int, n: int, *, least: int = 0, fewest: int = 1) -> None:
    """Check a number of elements, of at least `least`, and of workers, of at least `fewest`.

    Raises:
        ValueError: one is smaller, or no whole number.
    """
    whole(_OWNER, "d", d, least, None, "count the elements of the vector: 10**6, not 1e6")
    whole(_OWNER, "n", n, fewest, None, "count the workers")


def require_sizes(n: int, **nbytes: float) -> None:
    """Check the number of workers, and sizes in bytes by name.

    Raises:
        ValueError: n is no whole number from 1 on, or a size is negative or not finite.
    """
    require_counts(0, n)
    for name, size in nbytes.items():
        number(_OWNER, name, size, "[0, inf)", "give a number of bytes")
