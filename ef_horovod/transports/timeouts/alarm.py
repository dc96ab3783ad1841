"""Timeout for ops that block until all ranks take part and cannot be polled."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable

from ef_horovod.transports.timeouts import last_words

_GRACE_SECONDS = 20.0  # time for `expire` before the process is ended


class Alarm:
    """Watches running collectives; after the timeout it names the late one and calls `expire`.

    If `expire` does not return either, the process ends, because a silent hang is worse. A late
    collective is ignored if the call that it belongs to has ended: the call failed elsewhere.

    Args:
        timeout: limit in seconds, per collective.
        message: makes the error message from the names of the late collectives.
        expire: makes the late ops fail.
    """

    def __init__(
        self,
        timeout: float,
        message: Callable[[list[str]], str],
        expire: Callable[[], None],
    ) -> None:
        self._timeout = min(timeout, threading.TIMEOUT_MAX)
        self._message, self._expire = message, expire
        self._deadlines: dict[str, float] = {}
        self._under_way: dict[str, Callable[[], bool]] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self.rung = ""  # the message, once the alarm has gone off

    def start(self, name: str, under_way: Callable[[], bool] = lambda: True) -> None:
        """Start to watch a collective.

        Args:
            name: of the collective.
            under_way: called if it is late; returns whether the call that it belongs to still runs.
        """
        with self._changed:
            self._under_way[name] = under_way
            self._deadlines[name] = time.monotonic() + self._timeout
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._watch, name="ef_horovod alarm", daemon=True
                )
                self._thread.start()

    def stop(self, name: str) -> None:
        """The collective has ended."""
        with self._changed:
            self._forget(name)

    def _watch(self) -> None:
        while not self.rung:
            with self._changed:
                if not self._deadlines:
                    self._thread = None  # the next collective starts another one
                    return
                now = time.monotonic()
                late = sorted(name for name, limit in self._deadlines.items() if limit <= now)
                for name in [name for name in late if not self._under_way[name]()]:
                    self._forget(name)
                    late.remove(name)
                if late:
                    self.rung = self._message(late)
                else:
                    # New deadlines are never earlier than the known ones.
                    next_one = min(self._deadlines.values(), default=now)
                    self._changed.wait(max(next_one - now, 0.01))
        print(f"ef_horovod: {self.rung}", file=sys.stderr, flush=True)
        last_words.remember(self.rung, whatever_is_raised=True)
        ending = threading.Thread(target=self._expire, daemon=True)
        # The late op fails before `expire` returns. Then the main thread may exit, and Horovod
        # shuts down a second time. Two shutdowns at the same time hang.
        atexit.register(_await_or_exit, ending)
        ending.start()
        _await_or_exit(ending)

    def _forget(self, name: str) -> None:
        self._deadlines.pop(name, None)
        self._under_way.pop(name, None)


def _await_or_exit(ending: threading.Thread) -> None:
    ending.join(_GRACE_SECONDS)
    if ending.is_alive():
        os._exit(1)
