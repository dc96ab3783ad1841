"""Process sets: their members train together, and nobody else notices."""

from __future__ import annotations

import pytest
from launching import Results, horovod_job

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(3, "tf_process_sets.py", tmp_path_factory.mktemp("process_sets"))


@pytest.mark.parametrize("adapter", ["optimizer", "tape"])
@pytest.mark.parametrize(("name", "member", "outside"), [("first", 0, 1), ("second", 1, 0)])
def test_members_train_together_and_the_other_rank_alone(
    adapter: str, name: str, member: int, outside: int, results: Results
) -> None:
    ends = [result[f"{adapter} {name}"]["end"] for result in results]
    alone = [result["alone"] for result in results]
    assert len(set(alone)) == 3
    assert ends[member] == ends[2]
    assert ends[member] not in alone
    assert ends[outside] == alone[outside]


def test_optimizer_and_tape_average_alike_and_the_sets_apart(results: Results) -> None:
    shared = results[2]
    assert shared["optimizer first"] == shared["tape first"]
    assert shared["optimizer second"] == shared["tape second"]
    assert shared["tape first"]["end"] != shared["tape second"]["end"]


def test_a_rank_outside_sends_nothing(results: Results) -> None:
    assert results[1]["optimizer first"]["rows"] == results[0]["optimizer second"]["rows"] == 0
    assert results[0]["optimizer first"]["rows"] > 0


@pytest.mark.parametrize("holder", ["optimizer", "reducer"])
def test_two_ranks_go_on_with_the_state_that_three_saved(holder: str, results: Results) -> None:
    found = [result[f"file, {holder}"] for result in results]
    assert "got ef.save before the first step, expected it after a step" in found[1]["too early"]
    for two in (found[0], found[2]):
        assert two["same"]
        assert two["step"] == 10
    assert found[0]["end"] == found[2]["end"] != found[1]["end"]
