"""The cost model against the clock: steps of real exchanges on links of limited rate."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from processes import ENVIRONMENT

from ef_horovod import cost

pytestmark = [pytest.mark.alone, pytest.mark.parallel, pytest.mark.root, pytest.mark.slow]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cost_model.py"
HALF = 'Cast("float16")'
# Messages that are large for their compression's time: their steps are the network's.
CASES = {
    "dense": ("NoFeedback(Identity())", "dense"),
    "gather": (f"NoFeedback({HALF})", "gather"),
    "reduce": ("ErrorFeedback(Identity())", "reduce"),
    "double pass": (f"NoFeedback({HALF}, server_compressor={HALF})", "double_pass"),
}
TOLERANCE = 0.35  # by which a network may be faster than predicted; a busy machine is slower


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("cost_model_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("rate", "hosts", "mpi"),
    [
        ("50mbit", 2, "ring"),
        pytest.param("200mbit", 4, "ring", marks=pytest.mark.exhaustive),
        pytest.param("50mbit", 4, "default", marks=pytest.mark.exhaustive),
    ],
)
def test_steps_take_as_long_as_predicted(
    rate: str, hosts: int, mpi: str, benchmark: Any, tmp_path: Path
) -> None:
    elements = round(cost.Network.read(rate).bandwidth / 50)  # as long on any network
    cell = benchmark.Cell(rate, hosts, mpi, elements, repetitions=4)
    found = benchmark.measure(cell, CASES, tmp_path, TMPDIR=str(tmp_path), **ENVIRONMENT)
    for row in benchmark.compare(cell, CASES, found):
        in_time = row.least / 2 < row.network < (1 + TOLERANCE) * row.step
        assert in_time, f"expected a network's time from half of the least step on in {row}"
        assert row.bytes_out == pytest.approx(row.bytes_predicted, rel=1e-4)
