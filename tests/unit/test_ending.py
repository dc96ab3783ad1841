"""`hvd.join()` is refused while something averages; a shutdown that hangs ends with its process."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from types import ModuleType

import pytest
from processes import ENVIRONMENT

from ef_horovod.errors import UnsupportedError
from ef_horovod.transports.timeouts import ending

AT_EXIT = """
import time
from ef_horovod.transports.timeouts import ending

class Transport:
    timeout, size = {timeout}, 2

def shutdown():
    print("shutdown")
    time.sleep({seconds})

ending._GRACE_SECONDS = 0.5
transport = Transport()
ending.watch_over(transport, shutdown)
ending.watch_over(Transport(), shutdown)
{more}
print("unflushed", end="")
"""


class Transport:
    """What is asked of one."""

    timeout = 300.0

    def __init__(self, size: int) -> None:
        self.size = size


def ended(seconds: float, timeout: float, more: str = "") -> subprocess.CompletedProcess[str]:
    """A process whose shutdown takes so long."""
    code = AT_EXIT.format(seconds=seconds, timeout=timeout, more=more)
    environment = {**os.environ, **ENVIRONMENT}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=50, check=False
    )


@pytest.mark.parametrize(("timeout", "more"), [(0.1, ""), (300, "ending.hurry()")])
def test_a_shutdown_that_hangs_ends_with_a_sentence(timeout: float, more: str) -> None:
    process = ended(100, timeout, more)
    assert process.returncode == 1
    assert process.stdout == "unflushedshutdown\n"
    assert process.stderr.startswith("ef_horovod: Horovod's shutdown did not return in 0.5 s")
    assert "hvd.join(), which cannot go with compression" in process.stderr


@pytest.mark.parametrize("timeout", [1e3, math.inf])
def test_a_usual_shutdown_is_waited_for_once(timeout: float) -> None:
    process = ended(1, f"float('{timeout}')")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.count("shutdown") == 1


def test_ranks_in_groups_meet_before_the_shutdown_unless_one_fails() -> None:
    met = "ending.meet_at_end(lambda: print('met'))"
    assert "unflushedmet\nshutdown\n" in ended(0, 1, met).stdout
    broken = "ending.meet_at_end(lambda: 1 / 0)"
    assert "unflushedshutdown\n" in ended(0, 1, broken).stdout
    for more in (f"{met}\nraise SystemError", f"{met}\nending.hurry()"):
        process = ended(0, 1, more)
        assert "shutdown" in process.stdout
        assert "met" not in process.stdout


def test_join_is_refused_while_a_transport_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    framework, operations = ModuleType("framework"), ModuleType("framework.operations")
    framework.join = operations.join = lambda device=-1: device  # type: ignore[attr-defined]
    for module in (framework, operations):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(ending.atexit, "register", lambda *_: None)
    ending.refuse_join("framework", "framework.operations")
    transport, alone = Transport(2), Transport(1)
    ending.watch_over(transport, print)
    ending.watch_over(alone, print)
    for module in (framework, operations):
        with pytest.raises(UnsupportedError, match=r"got hvd.join\(\) while .* or call unwrap\(\)"):
            module.join()
    del transport
    assert framework.join(device=3) == 3
