"""Measures how fast a core of this machine runs the parts of a method's step, in about 1 s."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ef_horovod.arrays.keys import Key
from ef_horovod.exchange.network import Work
from ef_horovod.methods.base import Method

_LONGEST = 4_000_000  # elements; times of longer vectors are proportional
_REPETITIONS = 5


class _Times(NamedTuple):
    """Seconds of one step's parts."""

    push: float
    reduce: float
    pull: float


def measure_work(method: Method, d: int) -> Work:
    """Core seconds per element for the parts of a method's step, on NumPy arrays.

    They are medians over several steps. Other load on the machine, such as other ranks of the job,
    is included.

    Args:
        method: any method.
        d: number of elements; above 4 million, 4 million are measured.

    Example:
        >>> import ef_horovod as ef
        >>> work = measure_work(ef.ErrorFeedback(ef.OneBit()), 100_000)
        >>> 0 < work.push < 1e-6
        True
    """
    d = max(1, min(d, _LONGEST))
    gradient = np.random.default_rng(0).standard_normal(d, dtype=np.float32)
    few, many = (_typical(method, gradient, messages) for messages in (1, 3))
    decode = max(0.0, many.reduce - few.reduce) / 2
    return Work(
        push=few.push / d,
        decode=decode / d,
        aggregate=max(0.0, few.reduce - decode) / d,
        pull=few.pull / d,
        copy=_copying(gradient) / d,
    )


def _typical(method: Method, gradient: np.ndarray, messages: int) -> _Times:
    """Median seconds of each part, without the first two steps, which compile and warm up."""
    states = method.init(gradient, messages)
    steps = []
    for number in range(2 + _REPETITIONS):
        times, states = _step(method, states, gradient, number, messages)
        steps.append(times)
    return _Times(*(statistics.median(part) for part in zip(*steps[2:], strict=True)))


def _step(
    method: Method, states: tuple[Any, Any], gradient: np.ndarray, number: int, messages: int
) -> tuple[_Times, tuple[Any, Any]]:
    worker, server = states
    key, own = Key(0, number, 0, 0, messages), gradient.copy()
    (message, pushed), push = _timed(lambda: method.push(worker, own, key))
    received = [message] * messages
    (aggregate, server), reduce = _timed(lambda: method.reduce(server, received, key.of_server()))
    (_, worker), pull = _timed(lambda: method.pull(pushed, aggregate))
    return _Times(push, reduce, pull), (worker, server)


def _copying(gradient: np.ndarray) -> float:
    other = np.zeros_like(gradient)
    times = [_timed(lambda: np.copyto(other, gradient))[1] for _ in range(_REPETITIONS)]
    return statistics.median(times)


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    result = action()
    return result, time.perf_counter() - begin
