"""The end of a Horovod job: `hvd.join()` is refused, and no shutdown takes for ever.

A rank that has joined sends no messages, so compressed averages cannot go on without it. Where
somebody calls it all the same (by a name that was imported before this module), or a rank fails in
it, Horovod 0.28.1 may wait in its shutdown without an end.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from ef_horovod.errors import UnsupportedError

_GRACE_SECONDS = 20.0  # for a shutdown after something has failed, and at least for any other

_users: weakref.WeakSet[Any] = weakref.WeakSet()  # transports of wrapped optimizers and the like
_limits: dict[Callable[[], None], float] = {}  # in seconds, for a framework's shutdown


def refuse_join(*modules: str) -> None:
    """Put a guard into the place of `join` in these modules, for as long as anybody is using it."""
    original = importlib.import_module(modules[0]).join

    @functools.wraps(original)
    def join(*arguments: Any, **options: Any) -> Any:
        gc.collect()  # of an optimizer that was given up nothing may be left
        if any(transport.size > 1 for transport in _users):
            raise UnsupportedError(
                "got hvd.join() while gradients are averaged by ef_horovod, expected the same "
                "number of steps on all ranks, for a rank that has joined sends no messages; give "
                "all ranks as many batches (drop_last=True, .take(steps)), or call unwrap() first"
            )
        return original(*arguments, **options)

    for module in modules:
        importlib.import_module(module).join = join  # type: ignore[attr-defined]


def watch_over(transport: Any, shutdown: Callable[[], None]) -> None:
    """A transport that lives as long as a training: no `join` beside it, and an end with a limit.

    Args:
        transport: held weakly.
        shutdown: Horovod's, of the transport's framework; called at the end of the process.
    """
    _users.add(transport)
    if shutdown not in _limits:
        atexit.register(_shut_down, shutdown)
    limit = min(max(transport.timeout, _GRACE_SECONDS), threading.TIMEOUT_MAX)
    _limits[shutdown] = min(limit, _limits.get(shutdown, limit))


def hurry() -> None:
    """A collective has failed: the shutdown has no reason to take long."""
    for shutdown in _limits:
        _limits[shutdown] = _GRACE_SECONDS


def _shut_down(shutdown: Callable[[], None]) -> None:
    ending = threading.Thread(target=shutdown, name="ef_horovod shutdown", daemon=True)
    ending.start()
    ending.join(_limits[shutdown])
    if ending.is_alive():
        sys.stdout.flush()
        print(
            f"ef_horovod: Horovod's shutdown did not return in {_limits[shutdown]:g} s, so this "
            "process ends; see what the ranks said before (one has failed, or called hvd.join(), "
            "which cannot go with compression)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
