"""Starts the programs of the parallel tests; what each rank found out is read from files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from processes import BIN, JobFailed, run_job

PROGRAMS = Path(__file__).parent / "programs"
START = Path(__file__).parent / "start"  # what each rank and server does first

Results = list[dict[str, Any]]  # one for each rank, as it gave them to `report`


HOSTS = ("localhost", "127.0.0.1", "127.1")  # all of this machine, also for horovodrun


# What `horovodrun --mpi` calls (horovod/runner/mpi_run.py), without the 3 s that its own imports
# take. Examples, the demo and the tests of virtual hosts start with horovodrun itself.
_AS_HOROVODRUN = [
    "--tag-output",
    "-bind-to",
    "none",
    "-map-by",
    "slot",
    "-mca",
    "pml",
    "ob1",
    "-mca",
    "btl",
    "^openib",
]


def horovod_job(
    ranks: int,
    program: str,
    out: Path,
    *arguments: str,
    gloo: bool = False,
    hosts: Sequence[int] = (),
    **options: Any,
) -> Results:
    """Run tests/parallel/programs/PROGRAM as Horovod ranks, over MPI or Gloo.

    With `hosts` over Gloo, so many ranks are on a host each: Horovod takes this machine's names for
    different ones.
    """
    launcher = [str(BIN / "mpirun"), "-np", str(ranks), *_AS_HOROVODRUN]
    if gloo:
        names = [f"{name}:{count}" for name, count in zip(HOSTS, hosts, strict=False)]
        launcher = [str(BIN / "horovodrun"), "--gloo", "-np", str(ranks)]
        launcher += ["-H", ",".join(names)] if hosts else []
    return _run(launcher, ranks, program, out, arguments, **options)


def mpirun(
    ranks: int,
    program: str,
    out: Path,
    *arguments: str,
    before: Sequence[str] = (),
    **options: Any,
) -> Results:
    """Run a program under mpirun; `before` comes in front of the command line."""
    launcher = [*before, str(BIN / "mpirun"), "-np", str(ranks)]
    return _run(launcher, ranks, program, out, arguments, **options)


def torchrun(ranks: int, program: str, out: Path, *arguments: str, **options: Any) -> Results:
    """Run a program as ranks of torch.distributed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    return _run([*launcher, f"--nproc-per-node={ranks}"], ranks, program, out, arguments, **options)


def server_job(
    servers: int,
    workers: int,
    program: str,
    out: Path,
    *arguments: str,
    server: tuple[str, ...] = (),
    jobs: int = 0,
    before: Sequence[str] = (),
    **options: Any,
) -> Results:
    """Run a program on workers beside parameter servers, by `mpirun` with two programs.

    With `jobs`, the servers serve so many in a row (programs/server_again.py). `before` comes in
    front of the command line.
    """
    serve = servers_in_a_row(servers, jobs, *server) if jobs else server_command(servers, *server)
    launcher = [*before, *serve, ":", "-np", str(workers)]
    return _run(launcher, workers, program, out, arguments, **options)


def ended_job(
    servers: int,
    workers: int,
    program: str,
    out: Path,
    *arguments: str,
    server: tuple[str, ...] = (),
    jobs: int = 0,
    **options: Any,
) -> tuple[str, dict[int, Any]]:
    """The same for a job that has to fail: what it printed, and what workers could report."""
    serve = servers_in_a_row(servers, jobs, *server) if jobs else server_command(servers, *server)
    command = [*serve, ":", "-np", str(workers), sys.executable]
    try:
        run_program([*command, str(PROGRAMS / program), str(out), *arguments], **options)
    except JobFailed as failure:
        found = {int(file.stem[4:]): json.loads(file.read_text()) for file in out.glob("rank*")}
        return str(failure), found
    raise AssertionError(f"{program} {arguments} ended well, expected an error")


def server_command(servers: int, *arguments: str) -> list[str]:
    """The first half of such a job's command line."""
    python = [sys.executable, "-m", "ef_horovod.server"]
    return [str(BIN / "mpirun"), "-np", str(servers), *python, *arguments]


def servers_in_a_row(servers: int, jobs: int, *arguments: str) -> list[str]:
    """The same for several jobs."""
    python = [sys.executable, str(PROGRAMS / "server_again.py"), str(jobs)]
    return [str(BIN / "mpirun"), "-np", str(servers), *python, *arguments]


def alone(program: str, out: Path, *arguments: str, **options: Any) -> dict[str, Any]:
    """Run a program as a plain Python process, without a launcher."""
    return _run([], 1, program, out, arguments, **options)[0]


def _run(
    launcher: list[str],
    ranks: int,
    program: str,
    out: Path,
    arguments: tuple[str, ...],
    **options: Any,
) -> Results:
    run_program(
        [*launcher, sys.executable, str(PROGRAMS / program), str(out), *arguments], **options
    )
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def run_program(
    command: list[str], *, environment: dict[str, str] | None = None, **options: Any
) -> str:
    """Run a job whose processes begin with start/sitecustomize.py; what it printed."""
    given = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), **(environment or {})}
    paths = [str(START), *filter(None, [given["PYTHONPATH"]])]
    return run_job(command, environment={**given, "PYTHONPATH": os.pathsep.join(paths)}, **options)
