"""Trainings of the experiments by ranks: the numbers of one process, by a part of the ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import mpirun

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
