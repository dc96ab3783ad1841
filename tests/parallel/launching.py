"""Starts real jobs from tests: mpirun and horovodrun, with a limit, results read from files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent / "programs"
_BIN = Path(sys.executable).parent  # not resolved: a venv's python is a link

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # two cores, several ranks
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "EF_HOROVOD_TIMEOUT": "120",
    "PATH": f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}",
}


class JobFailed(AssertionError):
    """A job ended with an error or not at all; the message has its output."""


def horovodrun(
    ranks: int, program: str, out: Path, *arguments: str, gloo: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """Run tests/parallel/programs/PROGRAM under horovodrun; what each rank wrote with `report`."""
    how = "--gloo" if gloo else "--mpi"
    command = [str(_BIN / "horovodrun"), how, "-np", str(ranks)]
    return _run(command, ranks, program, out, arguments, **options)


def mpirun(
    ranks: int, program: str, out: Path, *arguments: str, **options: Any
) -> list[dict[str, Any]]:
    """Run a program under mpirun; what each rank wrote with `report`."""
    return _run(
        [str(_BIN / "mpirun"), "-np", str(ranks)], ranks, program, out, arguments, **options
    )


def alone(program: str, out: Path, *arguments: str, **options: Any) -> dict[str, Any]:
    """Run a program as a plain Python process, without a launcher."""
    return _run([], 1, program, out, arguments, **options)[0]


def _run(
    launcher: list[str],
    ranks: int,
    program: str,
    out: Path,
    arguments: tuple[str, ...],
    *,
    timeout: float = 180,
    environment: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    command = [*launcher, sys.executable, str(PROGRAMS / program), str(out), *arguments]
    job = subprocess.Popen(
        command,
        env={**os.environ, **_ENVIRONMENT, **(environment or {})},
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
        raise JobFailed(f"{command} did not end within {timeout} s:\n{output[-4000:]}") from None
    if job.returncode != 0:
        raise JobFailed(f"{command} ended with {job.returncode}:\n{output[-8000:]}")
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]
