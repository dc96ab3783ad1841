"""The order of runs of `benchmarks/time_to_accuracy.py`, and its table, without a training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
WAY = "Horovod dense"


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import time_to_accuracy_plan

    yield time_to_accuracy_plan
    for name in [n for n in sys.modules if n.startswith(("time_to_accuracy", "text_model"))]:
        del sys.modules[name]


def row(run, score, sent=None):
    curve = [[100, score - 1, sent and sent // 2], [200, score, sent]]
    facts = {"score": score, "curve": curve, "dense_steps": 0, "parameters": 1000}
    return {**run._asdict(), **facts}


def run_all(plan, score, ways, task="images"):
    """All runs in order, each with a score."""
    results, order = {}, []
    for run in plan.runs(results, [task], ways):
        order.append(run)
        results[run] = row(run, score(run))
    return results, order


def test_each_way_has_the_rate_that_its_short_runs_chose(plan):
    results, order = run_all(plan, lambda run: 90 - 100 * abs(run.lr - 0.2), [WAY])
    assert [(run.lr, run.epochs, run.seed) for run in order] == [
        (0.1, 5, 0),
        (0.2, 5, 0),
        (0.4, 5, 0),
        (0.2, 20, 0),
        (0.2, 20, 1),
        (0.2, 20, 2),
    ]
    assert plan.best_rate(results, "images", WAY, 5) == 0.2


def test_a_loss_is_better_when_it_is_lower(plan):
    way = "Horovod dense, AdamW"
    results, _ = run_all(plan, lambda run: run.lr, [way], "text")
    assert plan.best_rate(results, "text", way, 1) == 0.002


def test_first_seeds_of_all_ways_come_before_the_others(plan):
    _, order = run_all(plan, lambda run: 1.0, [WAY, "PowerSGD rank 1"])
    seeds = [run.seed for run in order]
    assert seeds == sorted(seeds, key=bool)
    assert len({run.way for run in order if run.seed == 0}) == 3  # DDP's too


def test_what_a_file_has_is_left_out_and_half_a_line_is_not_trusted(plan, tmp_path):
    _, order = run_all(plan, lambda run: 1.0, [WAY])
    file = tmp_path / "runs.jsonl"
    lines = [json.dumps(row(run, 1.0)) for run in order[:4]]
    file.write_text("\n".join(lines) + "\n" + json.dumps(row(order[4], 1.0))[:-9])
    assert list(plan.runs(plan.read(file), ["images"], [WAY])) == order[4:]


def test_the_table_says_when_dense_accuracy_was_reached(plan):
    import time_to_accuracy_report as report

    ours = "PowerSGD rank 1"
    scores = {WAY: 90.0, ours: 89.6, "DDP PowerSGD rank 1": 80.0}
    results, order = run_all(plan, lambda run: scores[run.way], list(scores))
    for run in order:
        if run.way == ours:
            results[run] = row(run, scores[ours], sent=6000)
    times = {("images", ours, "1gbit"): {"compressed_seconds": 0.5, "compressed_wire_bytes": 1}}
    lines = report.table(results, times, "images", 20).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    dense_bytes = 200 * 4 * 1000 * 1.5
    assert cells[0] == [WAY, "0.1", "90.00", "90.00 to 90.00", "1", "200", ""]
    part = f"1/{dense_bytes / 6000:.0f}"
    assert cells[1] == [ours, "0.1", "89.60", "89.60 to 89.60", part, "200", "100"]
    assert cells[2][5] == "never"
