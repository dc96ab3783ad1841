"""Trainings of the experiments by ranks: the numbers of one process, by a part of the ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import mpirun

from experiments.errors import Refused
from experiments.server_job import require_ranks
from experiments.workers import Workers

pytestmark = pytest.mark.parallel
ROOT = str(Path(__file__).parents[2])


@pytest.mark.slow
def test_four_of_five_ranks_train_as_one_process_does(tmp_path):
    results = mpirun(5, "network_ranks.py", tmp_path, environment={"PYTHONPATH": ROOT})
    assert [result["takes part"] for result in results] == [True] * 4 + [False]
    lead, *others = results[:4]
    for name, (loss, up, down, sent, entries, error) in lead["one process"].items():
        ranks = lead["ranks"][name]
        assert ranks[0] == loss
        assert ranks[1:3] == [up, down]
        assert [int(n) for n in ranks[3]] == sent  # which rounds down
        assert ranks[4] == entries
        assert ranks[5] == pytest.approx(error)
        assert all(other["ranks"][name][4] == entries for other in others)
        assert all(other["ranks"][name][0] == [] for other in others)  # only one looks


@pytest.mark.slow
def test_a_server_trains_as_one_process_does(tmp_path):
    results = mpirun(5, "server_training.py", tmp_path, environment={"PYTHONPATH": ROOT})
    simulated = results[0]["one process"]
    for result in results:  # all ranks get what the first worker recorded
        for name, plain in simulated.items():
            assert result["served"][name]["same"] == plain["same"]
    assert min(simulated["diverges"]["same"][2]) == float("inf")
    for served, plain in zip(
        results[0]["served"]["both ways"]["bytes"], simulated["both ways"]["bytes"], strict=True
    ):
        assert served == [n + 40 * step for n, step in zip(plain, (2, 4), strict=True)]  # headers


def test_a_server_job_has_one_server_and_four_workers():
    with pytest.raises(Refused, match="got 1 rank, expected 5: a server and 4 workers"):
        require_ranks(Workers())
