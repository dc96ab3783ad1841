"""The end of a Horovod job: `hvd.join()` is refused, and shutdown has a time limit.

A rank that has joined sends no messages, so compressed averages cannot continue without it. A
`join` imported before this module can still be called. After such a call, or if a rank fails in
`join`, Horovod 0.28.1 may wait in its shutdown forever.
"""

from __future__ import annotations

import atexit
import contextlib
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

_GRACE_SECONDS = 20.0  # limit of a shutdown after a failure, and minimum of any other limit

_users: weakref.WeakSet[Any] = weakref.WeakSet()  # transports of wrapped optimizers and the like
_barriers: list[Callable[[], Any]] = []
_limits: dict[Callable[[], None], float] = {}  # seconds, by the framework's shutdown function


def refuse_join(*modules: str) -> None:
    """Replace `join` in these modules; it raises while a transport of a training exists."""
    original = importlib.import_module(modules[0]).join

    @functools.wraps(original)
    def join(*arguments: Any, **options: Any) -> Any:
        gc.collect()  # remove the transports of deleted optimizers
        if any(transport.size > 1 for transport in _users):
            raise UnsupportedError(
                "got hvd.join() while gradients are averaged by ef_horovod, expected the same "
                "number of steps on all ranks, because a rank that has joined sends no messages; "
                "give all ranks the same number of batches (drop_last=True, .take(steps)), or call "
                "unwrap() first"
            )
        return original(*arguments, **options)

    for module in modules:
        importlib.import_module(module).join = join  # type: ignore[attr-defined]


def watch_over(transport: Any, shutdown: Callable[[], None]) -> None:
    """Register a training's transport: refuse `join`, and limit the time of the shutdown.

    Args:
        transport: held by a weak reference.
        shutdown: `hvd.shutdown` of the transport's framework; called at the end of the process.
    """
    _users.add(transport)
    if shutdown not in _limits:
        atexit.register(_shut_down, shutdown)
    limit = min(max(transport.timeout, _GRACE_SECONDS), threading.TIMEOUT_MAX)
    _limits[shutdown] = min(limit, _limits.get(shutdown, limit))


def meet_at_end(barrier: Callable[[], Any]) -> None:
    """Call a barrier of all ranks before the shutdown at exit; only the first one counts.

    Where ranks form groups, one may end while others are still in a collective of theirs, which a
    shutdown would break off. A rank that fails does not wait.
    """
    _barriers.append(barrier)


def hurry() -> None:
    """Shorten the shutdown's limit, after a collective has failed."""
    _barriers.clear()
    for shutdown in _limits:
        _limits[shutdown] = _GRACE_SECONDS


def _meet_and(shutdown: Callable[[], None]) -> None:
    if _barriers and getattr(sys, "last_type", None) is None:  # no exception ends this process
        with contextlib.suppress(Exception):  # Horovod was shut down, or another rank failed
            _barriers[0]()
    shutdown()


def _shut_down(shutdown: Callable[[], None]) -> None:
    target = functools.partial(_meet_and, shutdown)
    ending = threading.Thread(target=target, name="ef_horovod shutdown", daemon=True)
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
