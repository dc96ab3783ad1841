"""benchmarks/bandwidth.py and timeline.py on virtual hosts, and links that change their rate."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from clusters import run_in_cluster
from launching import PROGRAMS
from pages import python_blocks
from processes import JobFailed, run_job

pytestmark = [pytest.mark.parallel, pytest.mark.root]

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
PATHS = {"PYTHONPATH": str(ROOT)}
CLUSTER_PATHS = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "launch")])}


def run_benchmark(name: str, *words: str, timeout: float = 180) -> str:
    return run_job(
        [sys.executable, str(BENCHMARKS / name), *words], environment=PATHS, timeout=timeout
    )


@pytest.mark.alone
def test_a_link_changes_its_rate_both_ways(tmp_path: Path) -> None:
    ask = f"{sys.executable} {PROGRAMS / 'tcp_rates.py'} node1:node2,node2:node1"
    (change,) = python_blocks("docs/cluster.md")  # to 20 Mbit/s
    (tmp_path / "change.py").write_text(change)
    script = f"{ask} && {sys.executable} {tmp_path / 'change.py'} && {ask}"
    options = ["--hosts", "2", "--rate", "100mbit"]
    printed, _ = run_in_cluster(options, ["sh", "-c", script], tmp_path, **CLUSTER_PATHS)
    before, after = (json.loads(line) for line in printed.splitlines()[:2])
    for pair in ("node1:node2", "node2:node1"):
        for found, limit in ((before, 100e6), (after, 20e6)):
            best = max(time["rate"] for time in found[pair])
            assert 0.8 * limit < best < limit, f"{pair}: {found[pair]}"


def test_outside_of_a_cluster_no_link_is_changed(tmp_path: Path) -> None:
    change = "from virtual_cluster.network import change_rate; change_rate(20_000_000)"
    with pytest.raises(JobFailed, match="is no host of a cluster; start this in launch/cluster"):
        run_job([sys.executable, "-c", change], environment=CLUSTER_PATHS)


@pytest.mark.alone
def test_a_quick_run_measures_and_goes_on_where_it_was(tmp_path: Path) -> None:
    out = str(tmp_path / "found")
    printed = run_benchmark("bandwidth.py", "--quick", "--out", out)
    lines = [json.loads(line) for line in Path(f"{out}.jsonl").read_text().splitlines()]
    rows = {line["way"]: line for line in lines if "ok" in line}
    assert list(rows) == ["Horovod dense, ring", "EF21 top-k", "DoubleSqueeze 1 bit"]
    for row in rows.values():
        assert row["ok"]
        assert row["way"] in printed
        assert 0 < row["p10"] <= row["median"] <= row["p90"]
        # 391 steps of two workers with batches of 32 are less than an epoch, 782 are one.
        assert row["epoch"] == pytest.approx(782 * row["median"])
    dense, topk, double = rows.values()
    ring = 4 * dense["parameters"]  # of two hosts, each sends one vector in all
    assert dense["wire_bytes"] == pytest.approx(ring, rel=0.05)
    for row, most in ((topk, 1 / 70), (double, 1 / 30)):
        assert row["stats_bytes"] < most * ring
        off = abs(row["wire_bytes"] - row["resent_bytes"] - row["stats_bytes"])
        assert off < 0.05 * row["stats_bytes"] + row["control_bytes"] + 2000
    # The file lacks a row now: only that one is measured anew.
    Path(f"{out}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    run_benchmark("bandwidth.py", "--quick", "--out", out, "--resume")
    again = [json.loads(line) for line in Path(f"{out}.jsonl").read_text().splitlines()]
    assert [line["way"] for line in again if "ok" in line] == list(rows)
    assert again[: len(lines) - 1] == lines[:-1]


@pytest.mark.slow
def test_a_timeline_is_drawn(tmp_path: Path) -> None:
    words = ["--hosts", "2", "--rates", "1gbit", "--steps", "4", "--ways", "EF21 top-k"]
    run_benchmark("timeline.py", *words, "--out", str(tmp_path / "step"))
    assert (tmp_path / "step.png").stat().st_size > 5_000
    (row,) = json.loads((tmp_path / "step.json").read_text())
    inside = [float(row[kind]) for kind in ("forward", "backward", "wait", "update")]
    assert min(inside) > 0
    assert float(row["carry"]) > 0, "Horovod's own spans are there, at the same time"
    assert sum(inside) < 1.5 * float(row["step"])
