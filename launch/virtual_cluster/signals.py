"""Waiting for a child while signals arrive, for both processes of a cluster."""

from __future__ import annotations

import os
import signal

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Signals:
    """Blocks signals, so that they are read one by one and not delivered.

    Signals that the caller of the program ignores (nohup) stay ignored.
    """

    def __init__(self) -> None:
        watched = [kind for kind in _ENDING if signal.getsignal(kind) != signal.SIG_IGN]
        self._watched = {signal.SIGCHLD, *watched}
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, self._watched)

    def deliver(self) -> None:
        """Restore the signal mask, in a child that becomes another program."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def next(self, seconds: float | None = None) -> signal.struct_siginfo | None:
        """The next signal; None after `seconds`."""
        if seconds is None:
            return signal.sigwaitinfo(self._watched)
        return signal.sigtimedwait(self._watched, max(seconds, 0))


def was_sent(found: signal.struct_siginfo) -> bool:
    """Whether a process sent it. A terminal's signals reach all foreground processes anyway."""
    return found.si_code <= 0


def exit_status(status: int) -> int:
    """A process' exit status as a shell shows it, from the status of `os.waitpid`."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
