"""What `auto` takes on nodes with several ranks, and how mistakes end there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from launching import Results, horovod_job
from processes import JobFailed

pytestmark = [pytest.mark.parallel, pytest.mark.slow]
HOSTS = (2, 2)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("mistakes")
    return horovod_job(4, "node_mistakes.py", out, "mistakes", gloo=True, hosts=HOSTS, timeout=120)


def test_auto_takes_two_levels_where_groups_can_be_made(results: Results) -> None:
    for result in results:
        assert result["auto"] == {"names": ["dense", "hierarchical:gather"], "warned": []}


def test_auto_goes_on_without_groups_and_rank_0_says_so(results: Results) -> None:
    assert all(result["fixed"]["names"] == ["dense", "gather"] for result in results)
    warned = [result["fixed"]["warned"] for result in results]
    assert warned[1:] == [[], [], []]
    (text,) = warned[0]
    assert "although 2 ranks share a node's network interface" in text
    assert "write hvd.init(process_sets='dynamic')" in text


def test_groups_of_a_process_set_that_exist_in_part_are_named(results: Results) -> None:
    for result in results[:3]:
        partly = result["partly"]
        assert partly["error"].startswith(
            "UnsupportedError: got exchange='hierarchical' with a process_set, and no process sets "
            "of its ranks [[2], [0, 2]], expected one of each group"
        )
        assert "call hvd.add_process_set for each before" in partly["error"]
        assert partly["auto"] == {"names": ["dense", "gather"], "warned": []}


@pytest.mark.parametrize("exchange", ["gather", "auto:64kbit,0us"])
def test_a_rank_with_another_exchange_is_named_with_it(results: Results, exchange: str) -> None:
    for result in results:
        found = result[f"one {exchange}"]
        assert found["error"].startswith(
            "ConfigMismatchError: rank 0 has exchange='hierarchical', with groups of ranks first"
        )
        assert f"rank 1 has exchange='{exchange}'" in found["error"]
        assert found["seconds"] < 10


def test_a_rank_with_plain_horovod_ends_the_others_in_their_time(results: Results) -> None:
    for rank, result in enumerate(results[:3]):
        error = result["without"]["error"]
        assert error.startswith(f"CollectiveTimeoutError: rank {rank} of 4 waited 3 s in ")
        assert "see why it did not get there" in error
        assert result["without"]["seconds"] < 10


@pytest.mark.exhaustive
def test_a_killed_rank_ends_the_job(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(JobFailed, match="Process 3 exit with status code 137"):
        horovod_job(4, "node_mistakes.py", tmp_path, "killed", gloo=True, hosts=HOSTS, timeout=60)
    assert time.monotonic() - begin < 50
