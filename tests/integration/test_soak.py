"""benchmarks/soak.py: a short run of both jobs, and that it finds what it looks for."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
from jobs import ROOT
from processes import run_job

SCRIPT = ROOT / "benchmarks" / "soak.py"


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)  # it has its workers' program in a second file
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parallel
@pytest.mark.slow
def test_a_short_run_of_both_jobs(tmp_path):
    out = tmp_path / "soak"
    words = ["--quick", "--out", str(out)]
    printed = run_job([sys.executable, str(SCRIPT), *words], environment={"PYTHONPATH": str(ROOT)})
    everyone, quorum = json.loads(out.with_suffix(".json").read_text())
    assert printed.count("to the last bit") == 2
    assert everyone["rounds"] == [200] * 3
    assert min(quorum["rounds"]) >= 200
    assert everyone["dropped"][0] > 0, "no NaN was met"
    for job in (everyone, quorum):
        assert job["problems"] == []
        assert job["refused"] == 0
        assert job["held"]
        assert [row["rank"] for row in job["growth"]] == [
            "server",
            *(f"worker {rank}" for rank in range(3)),
        ]
        assert min(row["tenth"] for row in job["growth"]) > 20, "MB of a Python with NumPy"
    assert out.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parallel
def test_it_ends_when_the_time_is_over(tmp_path):
    out = tmp_path / "soak"
    words = ["--jobs", "all", "--rounds", "100000", "--seconds", "3", "--out", str(out)]
    run_job([sys.executable, str(SCRIPT), *words], environment={"PYTHONPATH": str(ROOT)})
    (job,) = json.loads(out.with_suffix(".json").read_text())
    assert 0 < job["rounds"][0] < 100_000
    assert job["problems"] == []


@pytest.fixture
def job(soak):
    """Two rounds of ones by three workers, all in order."""
    ones = soak.flat({name: np.ones(shape) for name, shape in soak.SHAPES.items()})
    worker = soak.Ended(2, 1, {1: 5, 2: 6}, given=2 * ones, applied=2 * ones, errors=0 * ones)
    log = [{"round": 3, "refused": 0, "bytes_up": 1.0}]
    samples = [soak.Sample(turn, [10**8] * 4) for turn in (2000, 10_000, 20_000)]
    return soak.Job("all", 1.0, samples, [worker] * 3, 0 * ones, log)


def test_a_sound_job_has_no_problem(soak, job):
    assert soak.problems(job) == []
    assert soak.verdict(job, soak.growth(job.samples))


def test_what_is_lost_is_found(soak, job):
    lost = job.workers[0].given.copy()
    lost[7] += 3
    first, *others = job.workers
    workers = [first._replace(given=lost), *others]
    assert "1 of 31301 sums differ, by up to 3" in soak.problems(job._replace(workers=workers))[0]
    other_rounds = [first, first._replace(digests={1: 4}), first]
    (problem,) = soak.problems(job._replace(workers=other_rounds))
    assert problem == "worker 1 applied other rounds than the longest list has"
    (problem,) = soak.problems(job._replace(log=[{"round": 4, "refused": 0}]))
    assert problem == "the server made 4 rounds and the workers saw 3"
    (problem,) = soak.problems(job._replace(log=[{"round": 3, "refused": 2}]))
    assert problem == "the server refused 2 messages"
    fewer = [first, first._replace(rounds=1), first]
    (problem,) = soak.problems(job._replace(workers=fewer))
    assert problem == "workers have [1, 2] rounds, expected one number"


def test_memory_that_grows_is_found(soak, job, capsys):
    leak = [[10**8, 10**8, 10**8 + 250 * turn, 10**8] for turn in (2000, 10_000, 20_000)]
    samples = [s._replace(resident=r) for s, r in zip(job.samples, leak, strict=True)]
    rows = soak.growth(samples)
    assert rows[2].bytes_a_round == pytest.approx(250)
    assert not soak.verdict(job._replace(samples=samples), rows)
    assert (
        "MISSED  memory: worker 1 grew most, by 4.50 MB, 4.0 MB allowed" in capsys.readouterr().out
    )
