"""The status line and the log of a server."""

from __future__ import annotations

import json

import pytest

from ef_horovod.server.monitor import ServerMonitor, Totals


@pytest.fixture
def parts(tmp_path):
    state = {"now": 100.0, "totals": Totals(0, 0, 0, 0, 0)}
    lines = []
    log = tmp_path / "new" / "log.jsonl"
    watch = ServerMonitor(
        lambda: state["totals"], 8000, lines.append, log, 2, every=10, clock=lambda: state["now"]
    )
    return watch, state, lines, log


def test_reports_are_of_the_time_since_the_last_one(parts):
    watch, state, lines, log = parts
    for bucket, worker in enumerate((1, 1, 1, 0)):
        state["now"] = 100.0 + bucket
        watch.arrived(1 - worker, bucket, complete=False)
        state["now"] += 0.25
        watch.arrived(worker, bucket, complete=True)
    state.update(now=109.0, totals=Totals(30, 3000, 6000, 0, 0))
    watch.look()
    assert not lines
    state.update(now=110.0, totals=Totals(40, 4000, 8000, 2, 1))
    watch.look()
    watch.arrived(0, 0, complete=True)  # alone, so nobody waited
    state.update(now=115.0, totals=Totals(60, 8000, 12000, 2, 1))
    watch.close()
    first, second = (json.loads(line) for line in log.read_text().splitlines())
    assert first == {
        "server": 2,
        "seconds": 10.0,
        "round": 40,
        "rounds_per_second": 4.0,
        "bytes_up": 100.0,
        "bytes_down": 200.0,
        "ratio_up": 1 / 80,
        "ratio_down": 1 / 40,
        "slowest_worker": 1,
        "slowest_share": 0.75,
        "waited": {"0": 0.25, "1": 0.75},
        "dropped": 2,
        "refused": 1,
    }
    assert (second["rounds_per_second"], second["bytes_up"], second["slowest_worker"]) == (
        4,
        200,
        0,
    )
    assert second["waited"] == {"0": 0.0}
    assert lines[0] == (
        "round 40: 4.0 rounds/s, a round has 0.00 MB up (1/80) and 0.00 MB down (1/40); worker 1 "
        "was last in 75 %"
    )


def test_nothing_is_said_where_nothing_happened(parts):
    watch, state, lines, log = parts
    state["now"] = 200.0
    watch.look()
    watch.close()
    assert not lines
    assert log.read_text() == ""


def test_no_log_is_asked_for():
    said = []
    totals = [Totals(0, 0, 0, 0, 0), Totals(1, 5, 5, 0, 0)]
    watch = ServerMonitor(lambda: totals.pop(0), 0, said.append, clock=lambda: 1.0)
    watch.close()
    assert said[0].startswith("round 1: ")
    assert "worker" not in said[0]  # with a quorum nobody is waited for


def test_a_disk_that_is_full_ends_the_log_and_not_the_training(parts):
    watch, state, lines, _ = parts
    watch._file.close()
    watch._file = open("/dev/full", "a")  # noqa: SIM115
    for rounds in (40, 80):
        state.update(now=10.0 * rounds, totals=Totals(rounds, 0, 0, 0, 0))
        watch.look()
    watch.close()
    assert ["could not write to the log" in line for line in lines] == [True, False, False]
    assert lines[2].startswith("round 80: ")
