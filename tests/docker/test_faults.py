"""A node is stopped or paused while a job trains: it ends in a named error in time, or goes on."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from nodes import NAMES, PYTHON, Job, Nodes

pytestmark = pytest.mark.docker

PAUSE = 20  # seconds
SLACK = 5  # for a busy machine to run a process that is due, and to show what it printed
SECONDS_TO_END = 60  # mpirun may wait 10 s twice, horovodrun about 25 s


@dataclass(frozen=True)
class Kind:
    """A kind of job, the node that is disturbed in it, and what it says.

    Attributes:
        launcher: the command line but for the program's arguments.
        node: on which it is not started.
        gone: what is printed when that node is stopped, a pattern.
        silent: what is printed when that node is paused beyond a limit of 8 s, a pattern. Of ranks
            that wait for the same, only the first is sure to be heard in time: mpirun then ends
            all, and while its daemons do that they hand on nothing.
        seconds: when that is due.
    """

    launcher: tuple[str, ...]
    node: str
    gone: str
    silent: str
    seconds: float = 8

    def command(self, steps: int) -> list[str]:
        """To train so many steps of 0.1 s and more."""
        return [*self.launcher, str(steps), "0.1"]


HOSTS = ",".join(f"{name}:1" for name in NAMES)
HOROVOD = ("-np", "4", "-H", HOSTS, PYTHON, "train_horovod.py")
# Without node1: Open MPI fills the host it is called on first, and the server is rank 0.
SERVER = (PYTHON, "-m", "ef_horovod.server.launch", "-s", "1", "-w", "2")
SERVER = (*SERVER, "-H", "node2:1,node3:1,node4:1", "--", PYTHON, "train_server.py")
# ssh names the node; mpirun says one or the other, as it hears of it by a socket or from ssh, and
# before ssh or after it.
LOST = (
    r"(?s)(?=.*Connection to {node} closed by remote host)"
    "(?=.*ORTE (has lost communication with a remote daemon|was unable to reliably start one or))"
)
# A rank names what it was in; or horovodrun hears of it by ssh first, and ends the ranks itself.
DOWN = (
    r"(?s)HorovodInternalError: rank \d of \d+ failed in 'ef0\."
    r"|Connection to {node} closed by remote host.*was:\s+Process name: 2\s"
)
WAITED = r"CollectiveTimeoutError: rank \d of 4 waited 8 s in 'ef0\."
KINDS = {
    "mpi": Kind(("horovodrun", "--mpi", *HOROVOD), "node3", LOST, WAITED),
    "gloo": Kind(("horovodrun", "--gloo", *HOROVOD), "node3", DOWN, WAITED),
    "worker": Kind(
        SERVER,
        "node3",
        r"ServerError: the server was told to end \(SIGTERM\): a rank has died",
        r"CollectiveTimeoutError: server 0 waited 8 s for workers \[0\] to send 'bucket\.0'",
    ),
    "server": Kind(
        SERVER,
        "node2",
        LOST,
        r"CollectiveTimeoutError: worker \d waited 10\.8 s in 'bucket\.0' for servers with ranks "
        r"\[0\]",
        1.1 * 8 + 2,
    ),
}


def train(kind: str, steps: int, limit: float, nodes: Nodes, folder: Path) -> Job:
    """A job that has begun to train, with this limit of its waits in seconds."""
    command = KINDS[kind].command(steps)
    job = nodes.start(command, folder / "log", 240, EF_HOROVOD_TIMEOUT=str(limit))
    job.wait_for(r"step 10\.", 120)
    return job


@pytest.mark.parametrize(
    ("how", "kind"), [("kill", "mpi"), ("stop", "gloo"), ("kill", "worker"), ("stop", "server")]
)
def test_a_node_that_is_gone_ends_the_job(how, kind, nodes: Nodes, tmp_path: Path) -> None:
    job = train(kind, 1000, 300, nodes, tmp_path)
    nodes.disturb(how, KINDS[kind].node)
    assert job.end(SECONDS_TO_END) != 0, "long before the limit of a wait"
    pattern = KINDS[kind].gone.replace("{node}", KINDS[kind].node)
    assert re.search(pattern, job.text()), job.text()


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_after_a_pause_within_the_limit(kind, nodes, tmp_path: Path) -> None:
    job = train(kind, 60, 60, nodes, tmp_path)
    nodes.disturb("pause", KINDS[kind].node)
    time.sleep(5)
    waiting_at = job.text().count("step ")
    time.sleep(PAUSE - 5)
    assert job.text().count("step ") == waiting_at < 60, "all wait for the paused node"
    nodes.disturb("unpause", KINDS[kind].node)
    assert job.end(SECONDS_TO_END) == 0, job.text()
    assert "step 60." in job.text()
    assert "parameters equal on" in job.text()
    assert "Error" not in job.text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pause_beyond_the_limit_ends_the_job(kind, nodes: Nodes, tmp_path: Path) -> None:
    job = train(kind, 1000, 8, nodes, tmp_path)
    began = nodes.disturb("pause", KINDS[kind].node)
    seconds = job.wait_for(KINDS[kind].silent, 30) - began
    assert KINDS[kind].seconds - 1 < seconds < KINDS[kind].seconds + SLACK
    time.sleep(max(0, PAUSE - seconds))
    # mpirun waits for the daemon of a node that is paused, whatever the ranks have said.
    nodes.disturb("unpause", KINDS[kind].node)
    assert job.end(SECONDS_TO_END) != 0
