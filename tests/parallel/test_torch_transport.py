"""The transport over torch.distributed under torchrun, with no Horovod."""

from __future__ import annotations

import pytest
from launching import Results, torchrun

pytestmark = pytest.mark.parallel
RANKS = 4


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return torchrun(RANKS, "torch_ranks.py", tmp_path_factory.mktemp("torch"))


def test_buffers_of_unequal_and_growing_sizes_are_gathered_in_rank_order(results: Results) -> None:
    expected = [[list(range(3 * rank + 1 + more)) for rank in range(RANKS)] for more in (0, 10, 0)]
    assert all(found["sizes"] == expected for found in results)


def test_each_rank_gets_its_part(results: Results) -> None:
    for rank, found in enumerate(results):
        assert found["parts"] == [[10 * peer + rank] * (rank + 1) for peer in range(RANKS)]


def test_sums_are_right_and_equal_on_all_ranks(results: Results) -> None:
    sums = [found["sums"] for found in results]
    assert max(one["error"] for one in sums) < 1e-5
    assert len({one["bytes"] for one in sums}) == 1
    assert all(one["again"] == [6.0, 6.0] for one in sums)


@pytest.mark.parametrize("exchange", ["gather", "double_pass", "hierarchical"])
def test_a_channel_is_the_simulation(results: Results, exchange: str) -> None:
    ends = [found[exchange] for found in results]
    assert len({end["bytes"] for end in ends}) == 1
    assert max(end["difference"] for end in ends) < 1e-5


def test_between_nodes_a_rank_sends_its_slice_to_one_other(results: Results) -> None:
    for found in results:
        assert found["hierarchical"]["sent"] < found["gather"]["sent"] / 4


def test_disagreement_is_named(results: Results) -> None:
    for found in results:
        assert found["disagreements"]["order"].startswith("ConfigMismatchError: rank ")
        assert "another collective" in found["disagreements"]["order"]
        assert found["disagreements"]["config"].startswith("ConfigMismatchError: rank 0 has mine 0")
        assert "all ranks have [2, 3, 4, 5]" in found["sums"]["unequal"]
        assert found["sums"]["half"].startswith("UnsupportedError: got float16")


def test_a_missing_rank_is_named_in_time(results: Results) -> None:
    for found in results[1:]:
        error, seconds = found["missing"]
        assert error.startswith("CollectiveTimeoutError")
        assert "for ranks [0]" in error
        assert seconds < 10


def test_it_needs_a_process_group_and_no_horovod(results: Results) -> None:
    for found in results:
        assert "init_process_group" in found["before"]
        assert not found["horovod"]
