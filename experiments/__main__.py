"""Run one experiment; started by launch/reproduce."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from ef_horovod.common.extras import explained, require
from ef_horovod.errors import EFHorovodError
from experiments.errors import Refused
from experiments.workers import Workers

NAMES = (
    "doublesqueeze",
    "ecx",
    "ef21",
    "ef21-variants",
    "ef21-w",
    "hard-threshold",
    "saddle",
    "server",
)


REFUSED = 2  # the status; 1 is that of a claim that does not hold
SECONDS_FOR_RANK_0 = 20


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--data", type=Path, required=True, metavar="PATH")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--mpi", action="store_true", help="each rank of this MPI job is a worker")
    options = parser.parse_args(words)
    transport = None
    try:
        if options.mpi:
            from ef_horovod.transports.mpi import MPITransport

            transport = MPITransport()
        return run(options, transport)
    except (Refused, ImportError, EFHorovodError) as error:
        if transport is not None and transport.rank != 0:
            # Rank 0 usually says the same, and its end ends this process before it can.
            time.sleep(SECONDS_FOR_RANK_0)
        print(f"experiments: error: {error}", file=sys.stderr, flush=True)
        if transport is not None:
            from mpi4py import MPI

            MPI.COMM_WORLD.Abort(REFUSED)  # MPI's usual end waits for all ranks
        return REFUSED


def run(options: argparse.Namespace, transport: Any) -> int:
    """Run what the options say; the exit status.

    Raises:
        Refused, ImportError: it cannot run; the message is for the user.
    """
    require("matplotlib", "the plot of an experiment")
    require_folder(options.out)
    with explained(f"the experiment {options.name}"):
        module = importlib.import_module(f"experiments.{options.name.replace('-', '_')}")
    workers, begin = Workers(transport), time.perf_counter()
    report = module.run(workers, options.data, options.quick)
    if not workers.leads:
        return 0
    report.settings["seconds"] = round(time.perf_counter() - begin)
    report.write(options.out, module.plot)
    print(report.text())
    held = sum(claim.holds for claim in report.claims)
    print(
        f"\n{held} of {len(report.claims)} claims hold; table, plot and JSON are in {options.out}/"
    )
    # Of an MPI job mpirun would take a 1 for a rank that failed; launch/reproduce reads the JSON.
    return 0 if report.all_hold or options.mpi else 1


def require_folder(out: Path) -> None:
    """Make the folder for the results, before minutes of work are spent on them.

    Raises:
        Refused: it cannot be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        problem = "" if os.access(out, os.W_OK) else "no permission to write"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise Refused(
            f"got --out {out}, where nothing can be written ({problem}), expected a folder that "
            "can be made and written to: name another one"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
