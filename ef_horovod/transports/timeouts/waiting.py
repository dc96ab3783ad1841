"""Waiting with a timeout; the error names what was missing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from numbers import Real
from typing import Any

from ef_horovod.errors import CollectiveTimeoutError

DEFAULT_TIMEOUT_SECONDS = 300.0

_LONGEST_NAP_SECONDS = 1e-3
_ASLEEP = 0.75  # part of the usual wait that is spent in one nap
_DUE, _DUE_SECONDS = 1.3, 0.01  # end of the time without naps: part of the usual wait; at most


def wait_until(done: Callable[[], bool], timeout: float, message: Callable[[], str]) -> None:
    """Poll `done` with growing naps, which leave the core to other threads and processes.

    Args:
        done: called repeatedly, until it returns True.
        timeout: limit in seconds.
        message: makes the error's text.

    Raises:
        CollectiveTimeoutError: the limit has passed.
    """
    nap = 2e-5
    deadline = time.monotonic() + timeout
    while not done():
        if time.monotonic() > deadline:
            raise CollectiveTimeoutError(message())
        time.sleep(nap)
        nap = min(2 * nap, _LONGEST_NAP_SECONDS)


class RecurringWaits:
    """Waits that recur in each step and take about as long as in the last one.

    Most of such a wait is one nap, which leaves the core to others. Near the expected end, polls
    follow each other with only a yield in between, because naps end late. Not for transports whose
    polls move the bytes.
    """

    def __init__(self) -> None:
        self._usual: dict[str, float] = {}  # seconds

    def until(
        self, name: str, done: Callable[[], bool], timeout: float, message: Callable[[], str]
    ) -> None:
        """As `wait_until`, for the recurring wait `name`.

        Raises:
            CollectiveTimeoutError: the limit has passed.
        """
        begin, usual = time.monotonic(), self._usual.get(name, 0.0)
        if not done():
            time.sleep(min(_ASLEEP * usual, timeout))
        if done():
            self._usual[name] = usual / 2
            return
        due = min(_DUE * usual, _ASLEEP * usual + _DUE_SECONDS, timeout)
        while not done() and time.monotonic() < begin + due:
            os.sched_yield()
        wait_until(done, begin + timeout - time.monotonic(), message)
        # A single long wait, such as the first one, must not make the next ones long.
        self._usual[name] = min(time.monotonic() - begin, 1.5 * usual + 5e-4)


def limit_of(timeout: float | None) -> float:
    """The limit of a wait in seconds: `timeout`, else $EF_HOROVOD_TIMEOUT, else 300.

    Raises:
        ValueError: it is not a positive number; infinity is allowed.
    """
    if timeout is not None:
        return require_limit(timeout)
    text = os.environ.get("EF_HOROVOD_TIMEOUT", "")
    return require_limit(text, "EF_HOROVOD_TIMEOUT") if text else DEFAULT_TIMEOUT_SECONDS


def require_limit(seconds: Any, name: str = "timeout") -> float:
    """A limit as a float, from a number or a text.

    Raises:
        ValueError: it is not a positive number.
    """
    try:
        limit = float(seconds) if isinstance(seconds, str | Real) else 0.0
    except (ValueError, OverflowError):
        limit = 0.0
    if isinstance(seconds, bool) or not limit > 0:
        raise ValueError(
            f"got {name}={seconds!r}, expected a positive number of seconds; leave it out for "
            f"{DEFAULT_TIMEOUT_SECONDS:g}, or set it to inf for no limit"
        )
    return limit
