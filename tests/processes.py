"""Starts the jobs that tests run for real, with a limit, in an environment for any machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

BIN = Path(sys.executable).parent  # not resolved: a venv's python is a link

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # two cores, several ranks
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TQDM_MININTERVAL": "10",
    "EF_HOROVOD_TIMEOUT": "120",
    "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
}


def own_network() -> list[str]:
    """What to put in front of a command for a loopback device that no other process uses.

    Nothing where the system does not allow it: the command then shares the machine's device.
    """
    words = ["unshare", "--net", "--map-root-user", "sh", "-c", 'ip link set lo up && exec "$@"']
    prefix = [*words, "sh"]
    try:
        allowed = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return []
    return prefix if allowed.returncode == 0 else []


class JobFailed(AssertionError):
    """A job ended with an error or not at all; the message has its output."""


def run_job(
    command: Sequence[str],
    *,
    timeout: float = 180,
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a command to its end, and all that it started; what it printed."""
    job = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that all of the job can be ended
    )
    try:
        output, _ = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        output, _ = job.communicate()
        raise JobFailed(f"{command} did not end within {timeout} s:\n{shortened(output)}") from None
    if job.returncode != 0:
        raise JobFailed(f"{command} ended with {job.returncode}:\n{shortened(output)}")
    return output


def shortened(output: str, most: int = 12_000) -> str:
    """The beginning, where the first rank fails, and the end of a long output."""
    half = most // 2
    return output if len(output) <= most else f"{output[:half]}\n[...]\n{output[-half:]}"
