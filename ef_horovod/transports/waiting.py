"""Waiting with a limit: every wait of the library ends, and says what for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from ef_horovod.errors import CollectiveTimeoutError
from ef_horovod.transports.base import DEFAULT_TIMEOUT_SECONDS

_LONGEST_NAP_SECONDS = 1e-3


def wait_until(done: Callable[[], bool], timeout: float, message: Callable[[], str]) -> None:
    """Poll `done` with growing naps, which leave the core to whoever is being waited for.

    Args:
        done: asked again and again.
        timeout: limit in seconds.
        message: what the error says, made when it is needed.

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


def default_timeout() -> float:
    """Seconds that a wait may take: $EF_HOROVOD_TIMEOUT, or 300."""
    text = os.environ.get("EF_HOROVOD_TIMEOUT", str(DEFAULT_TIMEOUT_SECONDS))
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"got EF_HOROVOD_TIMEOUT={text!r}, expected a number of seconds; unset it or set one"
        ) from None
