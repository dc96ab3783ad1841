"""Waiting for a child while signals come in: what both processes of a cluster do."""

from __future__ import annotations

import os
import signal

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Signals:
    """Signals that are held back, and read one after the other in place of being delivered.

    Those that the caller's caller ignores (nohup) stay ignored.
    """

    def __init__(self) -> None:
        watched = [kind for kind in _ENDING if signal.getsignal(kind) != signal.SIG_IGN]
        self._watched = {signal.SIGCHLD, *watched}
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, self._watched)

    def deliver(self) -> None:
        """As before: in a child that will be another program."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def next(self, seconds: float | None = None) -> signal.struct_siginfo | None:
        """The next one that came; None after so many seconds."""
        if seconds is None:
            return signal.sigwaitinfo(self._watched)
        return signal.sigtimedwait(self._watched, max(seconds, 0))


def was_sent(found: signal.struct_siginfo) -> bool:
    """Whether a process sent it; the terminal's go to all of its foreground's processes anyway."""
    return found.si_code <= 0


def exit_status(status: int) -> int:
    """Of a process, as a shell shows it, from what `os.waitpid` returns."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
