"""Wrapped optimizers over torch.distributed, and the hook of DDP, with no Horovod to import."""

from __future__ import annotations

from typing import Any

import pytest
from launching import torchrun

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return torchrun(4, "torch_distributed.py", tmp_path_factory.mktemp("transport"))


WAYS = "gather", "double_pass", "hierarchical", "reduce", "unequal", "updates"


def test_ranks_end_with_equal_parameters(ranks: list[dict[str, Any]]) -> None:
    for way in WAYS:
        assert len({rank[way][0] for rank in ranks}) == 1, way
    assert len({ranks[0][way][0] for way in WAYS}) == len(WAYS)


def test_without_horovod_torch_distributed_is_the_default(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["default"] == rank["gather"]
        assert rank["default"][2] == "TorchDistributed"
        assert "No module" in rank["horovod"] or "halted" in rank["horovod"]


def test_bytes_are_counted(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert 0 < rank["hierarchical"][1] < rank["gather"][1] < rank["unequal"][1]


def test_a_nan_drops_the_step_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["nan"] for rank in ranks)


def test_a_checkpoint_goes_on_with_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["checkpoint"] for rank in ranks)


def test_ranks_may_miss_different_gradients(ranks: list[dict[str, Any]]) -> None:
    """Collectives are matched by order, and hooks come in another order on each rank."""
    assert len({rank["unused"] for rank in ranks}) == 1


def test_a_process_group_has_its_own_parameters(ranks: list[dict[str, Any]]) -> None:
    halves = [rank["half"] for rank in ranks]
    assert halves[0][:2] == halves[1][:2] != halves[2][:2] == halves[3][:2]
    assert halves[3][1:] == [2, "rank 3 among ranks [2, 3]"]


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("config", ["ConfigMismatchError: rank 0 has", "rank 1 has", "expected the same"]),
        ("outside", ["UnsupportedError: got a process group without rank", "expected"]),
        ("in_sync", ["OutOfSyncError", "torch.distributed.broadcast"]),
        ("sharded", ["UnsupportedError: got parameters or an optimizer in shards", "expected"]),
        ("wrong", ["UnsupportedError: got transport='mpi', expected", "ef.TorchDistributed"]),
    ],
)
def test_mistakes(ranks: list[dict[str, Any]], case: str, parts: list[str]) -> None:
    for rank in ranks:
        for part in parts:
            assert part in rank[case]


def test_a_wait_ends_and_names_the_rank(ranks: list[dict[str, Any]]) -> None:
    assert "CollectiveTimeoutError: rank 0 of 4 waited 1 s in 'meeting'" in ranks[0]["late"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return torchrun(2, "torch_ddp.py", tmp_path_factory.mktemp("ddp"))


def test_the_hook_gives_the_numbers_of_the_wrapped_optimizer(pair: list[dict[str, Any]]) -> None:
    for rank in pair:
        assert rank["hook"] == rank["optimizer"] == pair[0]["hook"]
        assert rank["steps"] == 5


def test_without_loss_the_hook_gives_those_of_dense_ddp(pair: list[dict[str, Any]]) -> None:
    """With accumulation under no_sync, a static graph, and gradients that are views."""
    for rank in pair:
        for case in ("dense", "static", "views"):
            assert rank[case] < 1e-6, case


def test_state_outlives_ddps_new_buckets_and_a_checkpoint(pair: list[dict[str, Any]]) -> None:
    for rank in pair:
        assert rank["rebuilt"] > 0
        assert all(norm > 0 for norm in rank["kept"].values())
        assert rank["checkpoint"] < 1e-6


def test_a_nan_reaches_all_ranks_and_leaves_the_state(pair: list[dict[str, Any]]) -> None:
    for rank in pair:
        assert rank["nan"]
        assert rank["nan_kept"]


def test_unused_parameters_and_bfloat16(pair: list[dict[str, Any]]) -> None:
    assert pair[0]["unused"] == pair[1]["unused"]
    assert pair[0]["bfloat16"] == pair[1]["bfloat16"]


def test_the_hook_refuses_what_it_cannot_do(pair: list[dict[str, Any]]) -> None:
    for rank in pair:
        assert "got Linear, expected a DistributedDataParallel model" in rank["not_ddp"]
        assert "take ef.DistributedOptimizer with transport='torch'" in rank["momentum"]
        assert "got '0', an embedding with sparse gradients, expected dense" in rank["sparse"]


def test_the_pages_blocks_run(pair: list[dict[str, Any]]) -> None:
    assert [rank["blocks"] for rank in pair] == [pair[0]["blocks"]] * 2
    assert pair[0]["blocks"][0] == 2
