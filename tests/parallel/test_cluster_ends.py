"""However a cluster ends, nothing of it is left: no process, interface, mount or file."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from clusters import CLUSTER, network_state, processes_with, start_cluster
from processes import BIN, run_job

pytestmark = [pytest.mark.parallel, pytest.mark.root]


def wait_for(what: Callable[[], bool], seconds: float = 60) -> bool:
    limit = time.monotonic() + seconds
    while not what():
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """A shell's background job ignores SIGINT, nohup SIGHUP, and so would all that they start."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {kind: signal.signal(kind, handler) for kind, handler in handlers.items()}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


@pytest.fixture
def job(tmp_path: Path):
    """A cluster in which mpirun has started a process on each host, and a word that both have."""
    word = str(10**9 + uuid.uuid4().int % 10**9)  # seconds to sleep
    before = network_state()
    ranks = [str(BIN / "mpirun"), "-np", "2", "-H", "node1:1,node2:1", "sleep", word]
    launcher = start_cluster(ranks, tmp_path)

    def running() -> bool:
        names = [_name(pid) for pid in processes_with(word)]
        return names.count("sleep") == 2

    assert wait_for(running), launcher.communicate(timeout=5)
    yield launcher, word
    launcher.kill()
    assert wait_for(lambda: not processes_with(word), 10), "processes are left"
    assert network_state() == before


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.NoSuchProcess:
        return ""


def _mpirun_of(launcher: subprocess.Popen[str]) -> psutil.Process:
    """The command itself: mpirun, which a wrapper of that name has become."""
    for process in psutil.Process(launcher.pid).children(recursive=True):
        if process.name().startswith(("mpirun", "orterun")):
            return process
    raise AssertionError("found no mpirun below the cluster")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_goes_to_the_command_and_ends_all(kind, job, tmp_path: Path) -> None:
    launcher, word = job
    launcher.send_signal(kind)
    printed, _ = launcher.communicate(timeout=30)
    assert launcher.returncode != 0
    assert "bytes out" in printed, "the counters are shown all the same"
    assert not processes_with(word)
    assert not list(tmp_path.iterdir())


def test_control_c_reaches_the_command_once(tmp_path: Path) -> None:
    """A terminal interrupts all of its foreground; passed on as well, it would be twice."""
    script = "trap 'echo one' INT; echo ready; for i in 1 2 3 4 5; do sleep 0.2; done; exit 5"
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TMPDIR"] = str(tmp_path)
        os.execv(CLUSTER[0], [*CLUSTER, "--hosts", "1", "--", "sh", "-c", script])
    printed = ""
    while chunk := _read(terminal):
        printed += chunk
        if chunk.endswith("ready\r\n"):
            os.write(terminal, b"\x03")
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 5
    assert printed.count("one\r\n") == 1
    assert "bytes out" in printed
    assert not list(tmp_path.iterdir())


def _read(terminal: int) -> str:
    try:
        return os.read(terminal, 65536).decode()
    except OSError:  # Linux says so when nobody is left at the other end
        return ""


def test_a_command_that_does_not_end_is_killed_by_the_second_signal(tmp_path: Path) -> None:
    script = "trap '' TERM; echo ready; while true; do sleep 0.1; done"
    launcher = start_cluster(["sh", "-c", script], tmp_path)
    assert launcher.stdout.readline() == "ready\n"
    launcher.terminate()
    time.sleep(0.5)
    assert launcher.poll() is None, "it has half a minute to end"
    launcher.terminate()
    launcher.communicate(timeout=30)
    assert launcher.returncode == 137
    assert not list(tmp_path.iterdir())


def test_a_killed_command_takes_its_daemons_along(job, tmp_path: Path) -> None:
    launcher, word = job
    _mpirun_of(launcher).kill()
    printed, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 137
    assert "bytes out" in printed
    assert not processes_with(word)
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_is_killed_from_within_says_so(job, tmp_path: Path) -> None:
    launcher, word = job
    (first,) = psutil.Process(launcher.pid).children()
    first.kill()
    printed, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 137
    assert printed.endswith("the cluster was killed: its counters are lost\n")
    assert not processes_with(word)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("clean", [["--clean"], ["--hosts", "1", "--", "true"]])
def test_a_killed_launcher_leaves_a_folder_until_the_next_call(clean, job, tmp_path: Path) -> None:
    launcher, word = job
    (folder,) = tmp_path.iterdir()
    run_job([*CLUSTER, *clean], environment={"TMPDIR": str(tmp_path)})
    assert folder.exists(), "a cluster that runs is left alone"
    launcher.kill()
    launcher.wait()
    assert wait_for(lambda: not processes_with(word), 10), "the kernel ends what was in it"
    assert folder.exists()
    run_job([*CLUSTER, *clean], environment={"TMPDIR": str(tmp_path)})
    assert not list(tmp_path.iterdir())
