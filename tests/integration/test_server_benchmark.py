"""benchmarks/server.py: a short run of all of it, and what its numbers are made of."""

from __future__ import annotations

import importlib.util
import json
import os
import sys

import pytest
from jobs import ROOT
from processes import run_job

SCRIPT = ROOT / "benchmarks" / "server.py"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # it asks for one thread
    spec = importlib.util.spec_from_file_location("server_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parallel
def test_a_short_run_has_a_row_for_each_method(benchmark, tmp_path):
    out = tmp_path / "times.json"
    words = ["--n", "200000", "--workers", "2", "--repeat", "2", "--json", str(out)]
    printed = run_job([sys.executable, str(SCRIPT), *words], environment={"PYTHONPATH": str(ROOT)})
    report = json.loads(out.read_text())
    rows = {row["method"]: row for row in report["rounds"]}
    assert list(rows) == [row["method"] for row in report["computing"]] == list(benchmark.METHODS)
    for row in rows.values():
        assert row["method"] in printed
        assert (row["n"], row["workers"]) == (200_000, 2)
        assert min(row["round"], row["allreduce"], row["bandwidth"]) > 0
    dense, onebit, topk = rows.values()
    for way in ("bytes_up", "bytes_down"):
        assert 800_000 < dense[way] < 800_200, "the gradient and two headers"
        assert onebit[way] < dense[way] / 31
        assert topk[way] < dense[way] / 70
    # The slowest of all workers is shown, and a link carries all workers' bytes.
    assert dense["bound"] == pytest.approx(2 * dense["bytes_up"] / dense["bandwidth"])
    for row in report["computing"]:
        assert row["passes"] == pytest.approx((row["reduce"] - row["decode"]) / row["one"])
    assert report["held"] == (max(row["passes"] for row in report["computing"]) <= 3)


def test_the_bound_takes_the_busier_direction(benchmark):
    row = benchmark.Rounds(10, 3, "m", 1.0, 1.0, 100.0, 5.0, 20.0)
    assert row.bound == pytest.approx(0.6)


def test_the_limit_is_held_up(benchmark, capsys):
    good = benchmark.Computing(10, 1, "m", one=1.0, reduce=5.0, decode=2.0, checks=9.0)
    assert benchmark.hold_limit([good])
    assert not benchmark.hold_limit([good, good._replace(reduce=5.1)])
    assert capsys.readouterr().out.count("MISSED") == 1
