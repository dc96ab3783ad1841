"""The limit for calls that keep Python's lock: a process in which no thread of Python can run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from processes import ENVIRONMENT

from ef_horovod.transports.timeouts.watchdog import ended_after

# PyDLL keeps the lock during a call, as Horovod's bindings do.
_BEFORE = """
import ctypes, sys, time
from ef_horovod.transports.timeouts.watchdog import ended_after

def keep_the_lock(seconds):
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))

with ended_after(60, "the loop is compiled"):
    pass
print("ready", flush=True)
"""


def start(code: str) -> subprocess.Popen[str]:
    """Run code in a process of its own, to its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", _BEFORE + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def ended(code: str) -> tuple[int, str, str, float]:
    """Status, output, errors and seconds of such a process."""
    process = start(code)
    begin = time.monotonic()
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors, time.monotonic() - begin


def test_a_call_that_keeps_the_lock_ends_the_process() -> None:
    status, output, errors, seconds = ended("""
with ended_after(0.5, "rank 0 did not come back"):
    keep_the_lock(30)
print("it came back")
""")
    assert (status, output, errors) == (1, "", "ef_horovod: rank 0 did not come back\n")
    assert 0.4 < seconds < 10


def test_the_last_call_is_the_one_that_is_named() -> None:
    _, _, errors, _ = ended("""
for name in "abc":
    with ended_after(30, f"rank 0 waited in {name}, which is a name of some length"):
        pass
with ended_after(0.2, "rank 0 waited in d"):
    keep_the_lock(30)
""")
    assert errors == "ef_horovod: rank 0 waited in d\n"


@pytest.mark.parametrize("first_ends", ["before", "after"])
def test_calls_of_several_threads_are_watched_each_by_itself(first_ends: str) -> None:
    """Another thread's call that begins and ends meanwhile takes nobody's limit away."""
    status, output, errors, seconds = ended(f"""
import threading
begun, other_begun = threading.Event(), threading.Event()

def stuck():
    with ended_after(1, "this call did not come back"):
        begun.set()
        other_begun.wait()
        time.sleep(30)

threading.Thread(target=stuck, daemon=True).start()
begun.wait()
with ended_after(30, "another thread's call"):
    other_begun.set()
    time.sleep(0.2 if {first_ends == "after"} else 20)
time.sleep(20)
print("nobody has ended it")
""")
    assert (status, output, errors) == (1, "", "ef_horovod: this call did not come back\n")
    assert seconds < 10


def test_a_call_that_has_ended_does_not_end_another_threads() -> None:
    status, output, errors, _ = ended("""
import threading
waits = [threading.Event() for _ in range(100)]  # more than are watched at the same time

def call(event):
    with ended_after(0.7, "too early"):
        event.wait()

threads = [threading.Thread(target=call, args=(event,)) for event in waits]
for thread in threads:
    thread.start()
for event in waits:
    event.set()
    time.sleep(0.001)
for thread in threads:
    thread.join()
time.sleep(1)
print("they came back")
""")
    assert (status, output, errors) == (0, "they came back\n", "")


def test_calls_that_return_in_time_do_not_end_the_process() -> None:
    status, output, errors, _ = ended("""
for _ in range(8):  # together longer than the limit of one
    with ended_after(0.5, "too early"):
        keep_the_lock(0.2)
try:
    with ended_after(0.5, "an error has left the call"):
        raise KeyError
except KeyError:
    pass
keep_the_lock(1)  # watched by nobody
print("it came back")
""")
    assert (status, output, errors) == (0, "it came back\n", "")


def test_time_in_which_the_process_is_frozen_does_not_count() -> None:
    """A container that is paused in a call of a millisecond must not die as it wakes."""
    process = start("""
with ended_after(1, "too early"):
    keep_the_lock(0.5)
print("it came back")
""")
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2)
    os.kill(process.pid, signal.SIGCONT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "it came back\n", "")


def test_a_text_without_end_is_cut_and_a_limit_without_end_is_none() -> None:
    with ended_after(60, "x" * 10_000):
        pass
    with ended_after(float("inf"), "never"):
        time.sleep(0.1)


def test_a_rank_that_does_not_come_back_from_horovod_is_named() -> None:
    """Horovod's part is played by a call that keeps the lock: the deadlock itself is a race."""
    status, _, errors, seconds = ended("""
import horovod.torch as hvd
import numpy as np
from ef_horovod.transports.horovod_torch import HorovodTorchTransport

hvd.init()
transport = HorovodTorchTransport("ef0", timeout=0.5)
transport.allgather("bucket.0", np.zeros(3, np.uint8))()
hvd.allgather_async = lambda *words, **more: keep_the_lock(40)
transport.allgather("bucket.1", np.zeros(3, np.uint8))
""")
    assert status == 1
    assert "ef_horovod: rank 0 of 1 called Horovod for 'ef0.bucket.1', which did not" in errors
    assert "bucket.0" not in errors
    assert seconds < 30
