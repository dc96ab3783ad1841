"""The cost model against the clock: steps of real exchanges on links of limited rate."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import run_in_cluster
from launching import PROGRAMS
from processes import BIN

from ef_horovod import theory
from ef_horovod.spelling import read_method
from ef_horovod.theory.cost import SOFTWARE

pytestmark = [pytest.mark.parallel, pytest.mark.root, pytest.mark.slow]

HALF = 'Cast("float16")'
# Messages that are large for their compression's time: a busy machine delays the latter.
CASES = {
    "dense": ("NoFeedback(Identity())", "dense"),
    "gather": (f"NoFeedback({HALF})", "gather"),
    "reduce": ("ErrorFeedback(Identity())", "reduce"),
    "double pass": (f"NoFeedback({HALF}, down={HALF})", "double_pass"),
}
RINGS = {
    "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
    "OMPI_MCA_coll_tuned_allreduce_algorithm": "4",
    "OMPI_MCA_coll_tuned_allgatherv_algorithm": "3",
}
TOLERANCE = 0.35


def measured(hosts: int, rate: str, elements: int, software: str, out: Path) -> list[Any]:
    """What each rank found, for each case."""
    program = [sys.executable, str(PROGRAMS / "exchange_times.py"), str(out), str(elements), "4"]
    nodes = ",".join(f"node{i + 1}:1" for i in range(hosts))
    mpirun = [str(BIN / "mpirun"), "-np", str(hosts), "-H", nodes]
    variables = RINGS if software == "ring" else {}
    run_in_cluster(
        ["--hosts", str(hosts), "--rate", rate],
        [*mpirun, *program, json.dumps(CASES)],
        out,
        **variables,
    )
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(hosts)]


@pytest.mark.parametrize(
    ("rate", "hosts", "software"),
    [
        ("50mbit", 2, "ring"),
        ("50mbit", 4, "ring"),
        ("200mbit", 2, "ring"),
        ("200mbit", 4, "ring"),
        ("50mbit", 4, "default"),
    ],
)
def test_steps_take_as_long_as_predicted(
    rate: str, hosts: int, software: str, tmp_path: Path
) -> None:
    network = theory.Network.read(rate)
    elements = round(network.bandwidth / 50)  # the network takes as long at any rate
    found = measured(hosts, rate, elements, software, tmp_path)
    share = max(1.0, hosts / (os.cpu_count() or 1))
    for case, (method, exchange) in CASES.items():
        of_ranks = [rank[case] for rank in found]
        # All ranks were probed at the same time, so their speeds are those of a part of a core.
        speeds = np.mean([rank["work"] for rank in of_ranks], axis=0) / share
        cost = theory.step_cost(
            read_method(method),
            elements,
            hosts,
            exchange,
            network,
            software=SOFTWARE[software],
            work=theory.Work(*speeds),
            share=share,
        )
        # What else runs on the machine delays some steps of the four, seldom all of them.
        step, least = (max(rank[name] for rank in of_ranks) for name in ("step", "least"))
        said = f"{least:.3f} to {step:.3f} s, predicted {cost.step:.3f} s ({cost.network:.3f} s of "
        in_time = (1 - TOLERANCE) * least < cost.step < (1 + TOLERANCE) * step
        assert in_time, f"{case}: {said}network)"
        sent = np.mean([rank["bytes_out"] for rank in of_ranks])
        assert sent == pytest.approx(cost.traffic.sent, rel=1e-4)
