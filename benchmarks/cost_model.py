"""The cost model against the clock: steps on virtual hosts with links of limited rate.

    sudo python benchmarks/cost_model.py                              the grid: about 20 minutes
    sudo python benchmarks/cost_model.py --rates 100mbit --hosts 4    one network, rings and default
    sudo python benchmarks/cost_model.py --json grid.json

For each rate, number of hosts and way of Open MPI it is one Horovod job on `launch/cluster`, with a
rank on each host. A step begins at a barrier and ends with the direction on the slowest rank; the
median of the steps is shown, and beside it what `ef.cost.step_cost` predicts. Speeds of a core
are those that all ranks probed at the same time just before, for they share this machine's cores.
What else runs on the machine makes both wrong: the load is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from subprocess import run
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1] / "launch"))  # for the virtual cluster

import numpy as np
from tabulate import tabulate

from ef_horovod import cost
from ef_horovod.exchange.network import SOFTWARE
from ef_horovod.methods.parsing import read_method
from virtual_cluster.network import bucket

RANK = Path(__file__).with_name("cost_model_rank.py")
CLUSTER = Path(__file__).resolve().parents[1] / "launch" / "virtual_cluster"
BIN = Path(sys.executable).parent
FP16 = "Horovod fp16"
CASES = {
    "dense": ("NoFeedback(Identity())", "dense"),
    "fp16": (FP16, "fp16"),
    "top-k, gather": ("EF21(TopK(0.01))", "gather"),
    "1 bit, gather": ("DoubleSqueeze(OneBit(), server_compressor=OneBit())", "gather"),
    "1 bit, double pass": ("DoubleSqueeze(OneBit(), server_compressor=OneBit())", "double_pass"),
    "top-k, double pass": ("EF21(TopK(0.01), server_compressor=TopK(0.01))", "double_pass"),
    "random-k, reduce": ("EF21(RandomK(0.01))", "reduce"),
}
RINGS = {
    "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
    "OMPI_MCA_coll_tuned_allreduce_algorithm": "4",
    "OMPI_MCA_coll_tuned_allgatherv_algorithm": "3",
}
USUAL = {
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",  # as whom a cluster runs
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
WITHIN = 0.25
REPETITIONS = 7


class Cell(NamedTuple):
    """Where a job runs."""

    rate: str
    hosts: int
    mpi: str  # a key of `SOFTWARE`
    elements: int
    repetitions: int


class Row(NamedTuple):
    """A case of a cell; seconds and bytes."""

    case: str
    step: float  # median of the slowest rank
    least: float  # its fastest step
    predicted: float
    network: float  # the network's part of that
    bytes_out: float  # a rank, on average, as counted
    bytes_predicted: float


def measure(
    cell: Cell, cases: dict[str, tuple[str, str]], out: Path, **variables: str
) -> list[dict[str, Any]]:
    """What each rank of a job found, for each case.

    Raises:
        RuntimeError: the job failed; with the end of what it printed.
    """
    nodes = ",".join(f"node{i + 1}:1" for i in range(cell.hosts))
    cluster = [sys.executable, str(CLUSTER), "--hosts", str(cell.hosts)]
    mpirun = [str(BIN / "mpirun"), "-np", str(cell.hosts), "-H", nodes, sys.executable, str(RANK)]
    numbers = [str(cell.elements), str(cell.repetitions), json.dumps(cases)]
    job = run(
        [*cluster, "--rate", cell.rate, "--", *mpirun, str(out), *numbers],
        env={**os.environ, **USUAL, **(RINGS if cell.mpi == "ring" else {}), **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if job.returncode != 0:
        raise RuntimeError(
            f"{cell} ended with {job.returncode}: {(job.stdout + job.stderr)[-3000:]}"
        )
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(cell.hosts)]


def compare(
    cell: Cell, cases: dict[str, tuple[str, str]], found: Sequence[dict[str, Any]]
) -> list[Row]:
    """Measured and predicted, for each case."""
    network, rows = cost.Network.read(cell.rate), []
    network = replace(network, burst=bucket(round(network.bandwidth))[0])
    share = max(1.0, cell.hosts / (os.cpu_count() or 1))
    options: dict[str, Any] = {"software": SOFTWARE[cell.mpi], "share": share}
    for case, (method, exchange) in cases.items():
        of_ranks = [rank[case] for rank in found]
        if method == FP16:
            predicted = cost.half_precision_cost(cell.elements, cell.hosts, network, **options)
            sent = predicted.traffic.sent
        else:
            # Probed by all ranks at the same time, so these are the speeds of a part of a core.
            speeds = np.mean([rank["work"] for rank in of_ranks], axis=0) / share
            predicted = cost.step_cost(
                read_method(method),
                cell.elements,
                cell.hosts,
                exchange,
                network,
                work=cost.Work(*map(float, speeds)),
                **options,
            )
            sent = float(np.mean([rank["bytes_out"] for rank in of_ranks]))
        step, least = (max(rank[name] for rank in of_ranks) for name in ("step", "least"))
        rows.append(
            Row(case, step, least, predicted.step, predicted.network, sent, predicted.traffic.sent)
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", default="50mbit,200mbit,1gbit,10gbit")
    parser.add_argument("--hosts", default="2,4,8")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    table, everything = [], []
    for rate in asked.rates.split(","):
        slow = cost.Network.read(rate).bandwidth <= 50e6
        elements = 1_000_000 if slow else 3_600_000
        for hosts in map(int, asked.hosts.split(",")):
            for mpi in ("default", "ring"):
                cell, load = Cell(rate, hosts, mpi, elements, REPETITIONS), os.getloadavg()[0]
                with tempfile.TemporaryDirectory() as out:
                    rows = compare(cell, CASES, measure(cell, CASES, Path(out)))
                both = [f"{1e3 * row.step:.0f} / {1e3 * row.predicted:.0f}" for row in rows]
                table.append([rate, hosts, mpi, f"{load:.0f}", *both])
                print(" | ".join(map(str, table[-1])), flush=True)
                everything.append(
                    {**cell._asdict(), "load": load, "rows": [*map(Row._asdict, rows)]}
                )
    print(tabulate(table, ["rate", "hosts", "MPI", "load", *CASES], tablefmt="github"))
    errors = [abs(row["predicted"] / row["step"] - 1) for c in everything for row in c["rows"]]
    held = sum(error <= WITHIN for error in errors)
    print(f"\n{held} of {len(errors)} steps within {WITHIN:.0%}, milliseconds measured / predicted")
    if asked.json:
        asked.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
