"""Run one experiment; started by launch/reproduce."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

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


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--data", type=Path, required=True, metavar="PATH")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--mpi", action="store_true", help="each rank of this MPI job is a worker")
    options = parser.parse_args(words)
    transport = None
    if options.mpi:
        from ef_horovod.transports.mpi import MPITransport

        transport = MPITransport()
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
