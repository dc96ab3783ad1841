"""Elastic Horovod in PyTorch: ranks come, leave and are killed; error-feedback state goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import PROGRAMS, run_program
from processes import BIN

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

Lines = list[dict[str, Any]]


def elastic_job(out: Path, hosts: str, ranks: int, *arguments: str) -> list[Lines]:
    """Run programs/elastic.py under horovodrun; what each process noted, oldest process first."""
    script = out / "hosts.sh"
    (out / "hosts").write_text(hosts)
    script.write_text(f"#!/bin/sh\ncat {out / 'hosts'}\n")
    script.chmod(0o755)
    limits = ["-np", str(ranks), "--min-np", "1", "--max-np", "3"]
    run_program(
        [
            str(BIN / "horovodrun"), "--gloo", "--network-interfaces", "lo", *limits,
            "--host-discovery-script", str(script),
            sys.executable, str(PROGRAMS / "elastic.py"), str(out), *arguments,
        ]
    )  # fmt: skip
    files = sorted(out.glob("process*.jsonl"), key=lambda file: file.stat().st_ctime)
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def require_equal_and_continued(processes: list[Lines]) -> None:
    """All ranks have the same parameters and merged state in each step, also over a change."""
    everyones: dict[int, set[str]] = {}
    for lines in processes:
        for line in lines:
            digest = line.get("begins") or line.get("now") or line["ends"]
            facts = json.dumps([digest, line["held_back"]], sort_keys=True)
            everyones.setdefault(line["at"], set()).add(facts)
    for step, facts in everyones.items():
        # Before and after a change: the same to a rounding, which the sums show.
        found = [json.loads(each) for each in facts]
        assert len({digest for digest, _ in found}) == 1, step
        for _, sums in found:
            assert sums == pytest.approx(found[0][1], rel=1e-5, abs=1e-5), step
            assert sums["step"] == step


def test_two_then_three_then_two_ranks_lose_nothing(tmp_path: Path) -> None:
    arguments = ("2,3,2", "both ways", "double_pass", "committed")
    processes = elastic_job(tmp_path, "localhost:2\n", 2, *arguments)
    require_equal_and_continued(processes)
    ends = [lines[-1] for lines in processes if "ends" in lines[-1]]
    assert len(ends) == 2
    for lines in processes:
        if "ends" in lines[-1]:
            begins = [line for line in lines if "begins" in line]
            assert [line["size"] for line in begins] == [2, 3, 2]
            assert begins[1]["held_back"]["step"] >= 6


@pytest.mark.exhaustive
@pytest.mark.parametrize(("method", "exchange"), [("ef21", "gather"), ("ef", "double_pass")])
def test_a_killed_rank_leaves_what_it_had_committed(
    method: str, exchange: str, tmp_path: Path
) -> None:
    hosts = "localhost:2\n127.0.0.1:1\n"
    processes = elastic_job(tmp_path, hosts, 3, "3,2", method, exchange, "killed")
    require_equal_and_continued(processes)
    assert sum("ends" in lines[-1] for lines in processes) == 2


@pytest.mark.exhaustive
def test_ranks_that_leave_without_a_commit_end_no_job(tmp_path: Path) -> None:
    hosts = "localhost:2\n127.0.0.1:1\n"
    processes = elastic_job(tmp_path, hosts, 3, "3,2", "both ways", "double_pass", "checked")
    ends = [lines[-1] for lines in processes if "ends" in lines[-1]]
    assert len(ends) == 2
    assert ends[0]["ends"] == ends[1]["ends"]
