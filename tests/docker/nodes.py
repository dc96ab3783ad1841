"""The nodes of docker/compose.yml, and jobs that are started on the first of them."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PYTHON = "/opt/venv/bin/python"
NAMES = ("node1", "node2", "node3", "node4")
SECONDS_TO_ANSWER = 60  # for a node to start, with all others beside it
SECONDS_TO_VANISH = 45  # for the last process of a job, once it has ended; Gloo waits 30 s
OURS = ("python", "orted", "mpirun", "horovodrun")


class Nodes:
    """Containers by their names in the compose file."""

    def __init__(self, project: str) -> None:
        self._ids = {name: _container(project, name) for name in NAMES}

    def start(self, command: Sequence[str], log: Path, limit: float, **variables: str) -> Job:
        """Start a command on node1; it is ended there after `limit` seconds."""
        words = ["docker", "exec", "--workdir", "/work"]
        words += [word for pair in variables.items() for word in ("--env", "=".join(pair))]
        words += [self._ids["node1"], "timeout", "--kill-after=5", str(limit), *command]
        return Job(words, log, limit)

    def run(self, command: Sequence[str], log: Path, limit: float, **variables: str) -> str:
        """Run a command on node1 to its good end; what it printed."""
        job = self.start(command, log, limit, **variables)
        status = job.end(limit + 10)
        assert status == 0, f"{command} ended with {status}:\n{job.text()[-6000:]}"
        return job.text()

    def on(self, name: str, *command: str) -> str:
        """What a short command prints on a node."""
        return docker("exec", self._ids[name], *command)

    def disturb(self, how: str, name: str) -> float:
        """`docker HOW` a node (stop, kill, pause, unpause); the moment when that began."""
        began = time.monotonic()
        docker(how, *(["--time", "2"] if how == "stop" else []), self._ids[name])
        return began

    def wake_up(self) -> None:
        """Unpause what is paused."""
        for name in self._with_status("paused"):
            docker("unpause", self._ids[name])

    def restart(self) -> None:
        """Start what was stopped, and wait until it answers."""
        stopped = self._with_status("exited")
        for name in stopped:
            docker("start", self._ids[name])
        if stopped:
            self.wait_until_all_answer()

    def wait_until_all_answer(self) -> None:
        """Wait until a login on each node works, as a job needs it."""
        limit = time.monotonic() + SECONDS_TO_ANSWER
        for name in NAMES:
            command = ["docker", "exec", self._ids["node1"], "ssh", name, "true"]
            while subprocess.run(command, capture_output=True, timeout=30).returncode != 0:
                assert time.monotonic() < limit, f"{name} does not answer: {self.logs(name)}"
                time.sleep(0.2)

    def processes_left(self) -> dict[str, list[str]]:
        """Processes of jobs that go on on the nodes that run, after some time to end."""
        limit = time.monotonic() + SECONDS_TO_VANISH
        while left := self._processes():
            if time.monotonic() > limit:
                return left
            time.sleep(0.5)
        return {}

    def _processes(self) -> dict[str, list[str]]:
        found = {}
        for name in self._with_status("running"):
            lines = docker("top", self._ids[name], "-eo", "pid,args").splitlines()[1:]
            commands = [line.split(maxsplit=1)[1] for line in lines]
            ours = [line for line in commands if any(word in line for word in OURS)]
            found |= {name: ours} if ours else {}
        return found

    def _with_status(self, status: str) -> list[str]:
        ask = ("inspect", "--format", "{{.State.Status}}")
        return [name for name in NAMES if docker(*ask, self._ids[name]).strip() == status]

    def logs(self, name: str) -> str:
        return docker("logs", "--tail", "20", self._ids[name])


class Job:
    """A command that runs while a test goes on; what it prints is in a file."""

    def __init__(self, command: Sequence[str], log: Path, limit: float) -> None:
        self._log, self._limit = log, limit
        with log.open("w") as sink:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT
            )

    def text(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, pattern: str, seconds: float) -> float:
        """Wait until the job has printed what a pattern matches; returns the moment."""
        found = re.compile(pattern)
        return self._wait(
            lambda: found.search(self.text()) is not None, seconds, f"print {pattern!r}"
        )

    def end(self, seconds: float) -> int:
        """Wait until the job has ended; returns its status."""
        self._wait(lambda: self._process.poll() is not None, seconds, "end")
        return int(self._process.returncode)

    def _wait(self, done: Callable[[], bool], seconds: float, what: str) -> float:
        limit = time.monotonic() + seconds
        while not done():
            ended = self._process.poll() is not None and not done()
            if ended or time.monotonic() > limit:
                when = "before it ended" if ended else f"within {seconds:g} s"
                raise AssertionError(f"the job did not {what} {when}:\n{self.text()[-6000:]}")
            time.sleep(0.1)
        return time.monotonic()


def docker(*arguments: str) -> str:
    """Run a short command of Docker's client; what it printed, both ways together."""
    done = subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"docker {arguments}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def _container(project: str, name: str) -> str:
    labels = (f"project={project}", f"service={name}")
    filters = [
        word for label in labels for word in ("--filter", f"label=com.docker.compose.{label}")
    ]
    found = docker("ps", "--all", "--quiet", *filters).split()
    assert len(found) == 1, f"received {found} as {name} of {project}, expected one container"
    return found[0]
