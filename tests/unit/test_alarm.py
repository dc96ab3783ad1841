"""The alarm for waits that nobody can poll."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from ef_horovod.transports.timeouts.alarm import Alarm


class Rung:
    """An alarm that counts; `message` and `expire` say when they are called."""

    def __init__(self, timeout: float) -> None:
        self.names: list[list[str]] = []
        self.expired = 0
        self.done = threading.Event()
        self.alarm = Alarm(timeout, self._message, self._expire)

    def _message(self, names: list[str]) -> str:
        self.names.append(names)
        return f"waited for {names}"

    def _expire(self) -> None:
        self.expired += 1
        self.done.set()


def test_what_is_late_is_named_and_expires_once(capfd: pytest.CaptureFixture[str]) -> None:
    rung = Rung(0.2)
    begin = time.monotonic()
    rung.alarm.start("b")
    rung.alarm.start("a")
    assert rung.done.wait(5)
    assert 0.2 <= time.monotonic() - begin < 2
    time.sleep(0.4)  # another limit, for a second ring
    assert rung.expired == 1
    (names,) = rung.names
    assert "b" in names
    assert rung.alarm.rung == f"waited for {names}"
    assert f"ef_horovod: waited for {names}" in capfd.readouterr().err


def test_what_has_ended_does_not_ring() -> None:
    rung = Rung(0.2)
    for _ in range(5):
        rung.alarm.start("a")
        time.sleep(0.08)
        rung.alarm.stop("a")
    time.sleep(0.4)
    assert (rung.expired, rung.alarm.rung) == (0, "")


def test_the_limit_is_of_each_collective() -> None:
    """A long training of short waits does not ring; the one that stays does."""
    rung = Rung(0.4)
    rung.alarm.start("stays")
    rung.alarm.start("ends")
    rung.alarm.stop("ends")
    assert rung.done.wait(5)
    assert rung.names == [["stays"]]


def test_a_collective_that_begins_again_has_a_new_limit() -> None:
    rung = Rung(0.5)
    begin = time.monotonic()
    rung.alarm.start("a")
    time.sleep(0.3)
    rung.alarm.stop("a")
    rung.alarm.start("a")
    assert rung.done.wait(5)
    assert time.monotonic() - begin >= 0.75


def test_what_is_late_of_a_call_that_has_ended_does_not_ring() -> None:
    """The step failed elsewhere; one that is still under way rings all the same."""
    rung = Rung(0.2)
    rung.alarm.start("of a failed step", lambda: False)
    time.sleep(0.6)
    assert (rung.expired, rung.alarm.rung) == (0, "")
    rung.alarm.start("waits", lambda: True)
    rung.alarm.start("of a failed step", lambda: False)
    assert rung.done.wait(5)
    assert rung.names == [["waits"]]


def test_an_alarm_that_nobody_needs_leaves_no_thread_behind() -> None:
    rung = Rung(0.2)
    rung.alarm.start("a")
    rung.alarm.stop("a")
    time.sleep(0.6)
    assert rung.alarm._thread is None
    rung.alarm.start("b")
    assert rung.done.wait(5)
    assert rung.names == [["b"]]


def ended(code: str) -> tuple[subprocess.CompletedProcess, float]:
    """Run code in a process of its own; it and how long it took after its first line."""
    begin = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", _BEFORE + code], capture_output=True, text=True, timeout=60
    )
    return result, time.monotonic() - begin


_BEFORE = """
import atexit, threading, time
from ef_horovod.transports.timeouts import alarm
alarm._GRACE_SECONDS = 0.5
"""


def test_the_process_ends_if_its_end_hangs() -> None:
    """A collective that neither ends nor fails: nobody would see why the job stands still."""
    result, seconds = ended("""
a = alarm.Alarm(0.2, lambda names: f"rank 0 waited in {names}", lambda: time.sleep(100))
a.start("x")
time.sleep(100)
""")
    assert result.returncode == 1
    assert "ef_horovod: rank 0 waited in ['x']" in result.stderr
    assert seconds < 30


def test_an_exit_waits_for_the_end_that_is_under_way() -> None:
    """Horovod's exit handler must not shut down while `expire` does: both would hang."""
    result, _ = ended("""
log = []
atexit.register(lambda: print(log, flush=True))  # as Horovod's, registered first and so run last
failed = threading.Event()
def expire():
    failed.set()
    time.sleep(0.3)
    log.append("expired")
a = alarm.Alarm(0.1, str, expire)
a.start("x")
failed.wait()
""")
    assert result.returncode == 0
    assert result.stdout.strip() == "['expired']"


def test_a_limit_of_infinity_is_none(capfd):
    alarm = Alarm(float("inf"), str, lambda: None)
    alarm.start("x")
    time.sleep(0.1)
    assert alarm._thread.is_alive(), "the thread has failed"
    alarm.stop("x")
    assert capfd.readouterr().err == ""
