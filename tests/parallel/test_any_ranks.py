"""Error-feedback state saved by four ranks, loaded by three of them, in PyTorch."""

from __future__ import annotations

import pytest
from launching import Results, horovod_job

pytestmark = pytest.mark.parallel
METHODS = ["error feedback", "both ways", "ef21", "momentum", "low rank"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(4, "any_ranks.py", tmp_path_factory.mktemp("any_ranks"))


@pytest.mark.parametrize("name", METHODS)
def test_three_ranks_go_on_with_the_state_of_four(results: Results, name: str) -> None:
    ends = [result[name] for result in results[:3]]
    for end in ends:
        assert (end["size"], end["step"], end["steps"]) == (4, 6, 9)
        assert end["same"]
        assert end["decay"]
    assert len({end["end"] for end in ends}) == 1


def test_the_mean_of_the_memories_is_that_of_four_ranks(results: Results) -> None:
    for result in results[:3]:
        assert result["low rank"]["difference"] < 1e-6


def test_all_ranks_name_a_torn_file_and_another_method(results: Results) -> None:
    for result in results[:3]:
        found = result["error feedback"]
        assert "torn.ef, which is damaged or another kind of file" in found["torn"]
        assert found["torn"].startswith("StateFileError: ")
        assert "got a compression state of compression 'ErrorFeedback" in found["foreign"]
        assert found["unchanged"]
