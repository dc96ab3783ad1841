"""benchmarks/bandwidth.py without a cluster: the grid, what is kept of failures, the verdicts."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from ef_horovod.methods.parsing import read_method

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FAST, SLOW = 10**10, 10**8


@pytest.fixture(scope="module", autouse=True)
def on_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def plan():
    return importlib.import_module("bandwidth_plan")


@pytest.fixture
def driver():
    return importlib.import_module("bandwidth")


@pytest.fixture
def report():
    return importlib.import_module("bandwidth_report")


def test_the_grid_fits_in_its_time(plan, driver):
    cases = driver.chosen(driver.parse([]))
    every = driver.chosen(driver.parse(["--every"]))
    assert len(set(cases)) == len(cases) < len(every) / 3
    assert plan.total_seconds(cases, plan.Budget()) < 3600
    assert plan.total_seconds(driver.chosen(driver.parse(["--quick"])), plan.QUICK_BUDGET) < 40
    whole = [c for c in cases if c.hosts == 4 and c.model == "mlp"]
    by_nodes = {name for name, way in plan.WAYS.items() if way.exchange == "hierarchical"}
    assert {c.way for c in whole} == set(plan.WAYS) - by_nodes
    several = driver.chosen(driver.parse(["--ranks-per-host", "2", "4"]))
    assert by_nodes < {c.way for c in several} == set(plan.SEVERAL_WAYS)
    assert {(c.model, c.per_host, c.ranks // c.hosts) for c in several} == {
        ("mlp", 2, 2),
        ("mlp", 4, 4),
    }
    assert {wanted[0].per_host for _, _, wanted in plan.jobs(several)} == {2, 4}
    assert {c.rate for c in whole} == set(plan.RATES)
    measured = [case for _, _, wanted in plan.jobs(cases) for case in wanted]
    assert sorted(measured) == sorted(cases)
    assert not [c for c in every if c.model != "mlp" and plan.WAYS[c.way].group == "tensorflow"]


@pytest.mark.parametrize("benchmark", ["bandwidth", "timeline"])
def test_a_rate_that_is_none_is_told_in_a_sentence(benchmark, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(benchmark).parse(["--rates", "fast"])
    assert "got the rate 'fast', expected 64kbit or more, as in 100mbit" in capsys.readouterr().err


def test_filters_choose(driver):
    words = ["--hosts", "4", "--rates", "100mbit", "--models", "mlp", "--ways", "EF21"]
    cases = driver.chosen(driver.parse(words))
    assert {(c.hosts, c.rate, c.model) for c in cases} == {(4, SLOW, "mlp")}
    assert {c.way for c in driver.chosen(driver.parse([*words, "--groups", "tensorflow"]))} == {
        "TensorFlow: EF21 top-k"
    }
    assert all("EF21" in case.way for case in cases)


def test_all_methods_can_be_read_and_go_by_their_exchange(plan):
    from ef_horovod.training.choice import choose

    for way in plan.WAYS.values():
        if way.ours:
            exchange = way.exchange_on(plan.RATES[0])
            exchange = {"stock": "gather", "server": "auto"}.get(exchange, exchange)
            assert choose(exchange, read_method(way.method)).name


def test_guesses_of_bytes_are_those_of_messages(plan):
    import numpy as np

    import ef_horovod as ef

    d = 100_000
    x = np.random.default_rng(0).standard_normal(d).astype(np.float32)
    for way in plan.WAYS.values():
        if way.ours and "PowerSGD" not in way.method:
            sent = read_method(way.method).compressor.compress(x, ef.Key(workers=4)).nbytes
            assert sent / d == pytest.approx(way.up, rel=0.05), way.name


@pytest.mark.parametrize(("step", "steps"), [(0.01, 40), (0.1, 20), (1.0, 8), (3.0, 5), (40.0, 3)])
def test_steps_follow_from_the_budget(plan, step, steps):
    assert plan.Budget().steps(step) == steps


def test_the_last_row_of_a_case_counts(plan, tmp_path):
    file = tmp_path / "rows.jsonl"
    case = plan.Case("mlp", "EF21 top-k", 2, SLOW)
    good, bad = {**case._asdict(), "ok": True, "median": 0.1}, {**case._asdict(), "ok": False}
    for lines, ok in (([{"settings": {}}, bad, good], True), ([good, bad], False)):
        file.write_text("\n".join(map(json.dumps, lines)) + '\n{"model": "ml')
        (row,) = plan.rows_of(file)
        assert row["ok"] is ok
        assert plan.case_of(row) == case


def test_ways_are_repeated_in_turn_and_the_middle_counts(plan, driver, tmp_path):
    words = ["--rates", "10gbit", "1gbit", "--hosts", "2", "--models", "mlp", "--repeat", "3"]
    options = driver.parse([*words, "--ways", "EF21 top-k, auto", "dense, ring"])
    cases = driver.chosen(options) * options.repeat
    ((_, _, wanted),) = plan.jobs(cases)
    ways = ["Horovod dense, ring", "EF21 top-k, auto"]
    assert [(case.way, case.rate) for case in wanted] == [(way, FAST) for way in 3 * ways] + [
        (way, FAST // 10) for way in 3 * ways
    ]
    file, medians = tmp_path / "rows.jsonl", [0.3, 0.1, 0.2, 0.9, 0.8, 0.7] * 2
    rows = [{**c._asdict(), "ok": True, "median": m} for c, m in zip(wanted, medians, strict=True)]
    file.write_text("\n".join(map(json.dumps, rows)))
    found = {plan.case_of(row): row["median"] for row in plan.rows_of(file)}
    assert found == {
        wanted[0]: 0.3,  # of 0.3, 0.2, 0.8
        wanted[1]: 0.7,  # of 0.1, 0.9, 0.7
        wanted[6]: 0.3,
        wanted[7]: 0.7,
    }


def test_an_interrupted_run_goes_on_with_the_turns_that_are_left(plan, driver, tmp_path):
    first, other = (plan.Case("mlp", way, 2, SLOW) for way in ("EF21 top-k", "DDP dense"))
    rows = [{"settings": {}}] + [
        {**case._asdict(), "ok": ok} for case, ok in ((first, True), (other, False), (first, True))
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert driver.not_in(file, [first, other]) == [other]
    assert driver.not_in(file, [first, other] * 3) == [other, other, first, other]


class FakeJob:
    """A job that measures some cases, then fails, or not at all."""

    started: list[int] = []  # noqa: RUF012 - reset by those who use it

    def __init__(self, group, hosts, cases, budget, data, folder):
        self.cases = list(cases)
        FakeJob.started.append(len(cases))

    def rows(self):
        for case in self.cases:
            if case.way == "DDP fp16":
                yield {**case._asdict(), "ok": False, "why": "status 1"}
                return
            yield {**case._asdict(), "ok": True}
        yield {"ok": False, "why": "status 1 in the end"}

    def stop(self):
        pass


def test_what_fails_takes_no_other_case_along(driver, plan, monkeypatch):
    monkeypatch.setattr(driver, "Job", FakeJob)
    FakeJob.started = []
    cases = [plan.Case("mlp", way, 2, SLOW) for way in ("DDP dense", "DDP fp16", "EF21 top-k")]
    rows = list(driver.run_group("ddp", 2, cases, plan.Budget(), None))
    assert [plan.case_of(row) for row in rows] == cases
    assert [row["ok"] for row in rows] == [True, False, True]
    assert FakeJob.started == [3, 1]


def test_jobs_that_come_to_nothing_end(driver, plan, monkeypatch):
    class Hopeless(FakeJob):
        def rows(self):
            yield {"ok": False, "why": "no cluster here"}

    monkeypatch.setattr(driver, "Job", Hopeless)
    FakeJob.started = []
    cases = [plan.Case("mlp", way, 2, SLOW) for way in plan.WAYS]
    rows = list(driver.run_group("ring", 2, cases, plan.Budget(), None))
    assert sorted(plan.case_of(row) for row in rows) == sorted(cases)
    assert not any(row["ok"] for row in rows)
    assert len(FakeJob.started) == driver.JOBS_WITHOUT_RESULT
    assert rows[0]["why"] == "no cluster here"
    assert rows[-1]["why"].startswith("not tried")


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("echo no room >&2; exit 3", "status 3: no room"),
        ("echo stuck; sleep 60", "took longer than its limit: stuck"),
    ],
)
def test_a_job_ends_and_says_why(driver, plan, monkeypatch, tmp_path, program, why):
    monkeypatch.setattr(driver, "line", lambda *_: ["sh", "-c", program])
    monkeypatch.setattr(driver, "START_LIMIT_SECONDS", 1.0)
    case = plan.Case("mlp", "EF21 top-k", 2, SLOW)
    job = driver.Job("ring", 2, [case], plan.Budget(), None, tmp_path)
    (row,) = job.rows()
    job.stop()
    assert not row["ok"]
    assert row["why"] == why
    assert job._process.poll() is not None


def results(plan, seconds, sent=1000.0):
    """Lines of a file in which ways take so many seconds at 100 Mbit/s, 4 hosts, and faster a
    tenth."""
    lines = []
    for way in plan.WAYS:
        for hosts in (2, 4, 8):
            for rate, factor in ((SLOW, 1.0), (FAST, 0.1)):
                case = plan.Case("mlp", way, hosts, rate)
                time = factor * seconds.get(way, 1.0)
                ours = plan.WAYS[way].ours
                double = plan.WAYS[way].exchange == "double_pass"
                bytes_ = sent * (hosts - 1) / (hosts if double else 1)
                row = {"ok": True, "median": time, "p10": time, "p90": time, "steps": 8}
                row |= {"stats_bytes": bytes_ if ours else None, "wire_bytes": bytes_}
                row |= {"control_bytes": 0.0, "load": 1.0, "data": "random"}
                row |= {f"seconds_{x}": 0.0 for x in ("compress", "wait", "decompress")}
                lines.append({**case._asdict(), **row})
    return "\n".join(map(json.dumps, lines)) + "\n"


GOOD = {"EF21 top-k": 0.1, "PowerSGD rank 4": 0.1, "DDP PowerSGD rank 4": 0.1, "DDP fp16": 0.5}


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"EF21 top-k": 0.101}, ["dense", "fp16", "PowerSGD"]),
        ({"DDP dense": 0.9}, ["dense"]),
        ({"Horovod dense, default": 0.9}, ["dense"]),
        ({"DDP fp16": 0.49}, ["fp16"]),
        ({"DDP PowerSGD rank 4": 0.09}, ["PowerSGD", "own PowerSGD"]),
        ({"PowerSGD rank 4": 0.11}, ["own PowerSGD"]),
    ],
)
def test_ratios_decide(plan, report, tmp_path, change, broken):
    file = tmp_path / "rows.jsonl"
    file.write_text(results(plan, {**GOOD, **change}))
    claims = report.make(file).claims[:4]
    names = ["dense", "fp16", "PowerSGD", "own PowerSGD"]
    assert [name for name, claim in zip(names, claims, strict=True) if not claim.holds] == broken


def test_a_double_pass_grows_with_the_slices_it_sends(plan, report, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(results(plan, GOOD))
    found = {claim.claim: claim.holds for claim in report.make(file).claims}
    assert not found["bytes of a double pass, 2 to 8 hosts"], "1/2 of it at 2 hosts, 7/8 at 8"
    assert found["bytes of a double pass, of a dense ring's, 2 to 8 hosts"]
    assert found["bytes of a gather over n - 1, 2 to 8 hosts"]


def test_the_slowest_growth_decides(plan, report, tmp_path):
    file = tmp_path / "rows.jsonl"
    name = "server, 1 bit: DoubleSqueeze's time grows slowest with 1/bandwidth"
    for seconds, holds in ((1.0, True), (1.2, False)):
        file.write_text(results(plan, {**GOOD, "server: DoubleSqueeze 1 bit": seconds}))
        found = {claim.claim: claim.holds for claim in report.make(file).claims}
        assert found[name] == holds


def test_bytes_that_do_not_agree_are_found(plan, report, tmp_path):
    file = tmp_path / "rows.jsonl"
    for off, holds in ((1.04, True), (1.06, False), (0.94, False)):
        text = results(plan, GOOD, sent=1e6)
        lines = [json.loads(line) for line in text.splitlines()]
        lines[-1]["wire_bytes"] *= off
        assert lines[-1]["stats_bytes"] is not None
        file.write_text("\n".join(map(json.dumps, lines)) + "\n")
        found = {claim.claim: claim.holds for claim in report.make(file).claims}
        assert found["bytes by interfaces agree with stats()"] == holds


def test_what_was_resent_is_no_fault_of_the_count(plan, report, tmp_path):
    file = tmp_path / "rows.jsonl"
    for part, holds in ((0.1, True), (0.02, False)):
        lines = [json.loads(line) for line in results(plan, GOOD, sent=1e6).splitlines()]
        sent = lines[-1]["stats_bytes"]
        lines[-1] |= {"wire_bytes": 1.1 * sent, "resent_bytes": part * sent}
        file.write_text("\n".join(map(json.dumps, lines)) + "\n")
        found = {claim.claim: claim.holds for claim in report.make(file).claims}
        assert found["bytes by interfaces agree with stats()"] == holds


def test_what_was_not_measured_does_not_hold(plan, report, tmp_path):
    file = tmp_path / "rows.jsonl"
    case = plan.Case("mlp", "EF21 top-k", 4, SLOW)
    file.write_text(json.dumps({**case._asdict(), "ok": False, "why": "status 1: a | b"}) + "\n")
    found = report.make(file)
    assert not any(claim.holds for claim in found.claims)
    assert any("not measured" in claim.measured for claim in found.claims)
    assert "status 1: a / b" in found.text(), "failures are on the page"
    assert "failed" in found.text()


def test_a_page_has_tables_plots_and_where_we_lose(plan, report, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(results(plan, {**GOOD, "DDP PowerSGD rank 4": 0.05}))
    out = tmp_path / "page"
    out.mkdir()
    (out / "bandwidth.md").write_text("# Title\n\nwords\n\n## bandwidth\n\nof yesterday\n")
    report.write(report.make(file), out)
    text = (out / "bandwidth.md").read_text()
    assert text.startswith("# Title\n\nwords\n\n## bandwidth\n")
    assert "of yesterday" not in text
    assert "we lose" in text
    for name in ("bandwidth.png", "bandwidth-epochs.png", "bandwidth-hosts.png"):
        assert (out / name).stat().st_size > 10_000
