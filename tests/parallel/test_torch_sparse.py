"""Sparse gradients in PyTorch (`nn.Embedding(sparse=True)`), on three ranks."""

from __future__ import annotations

import numpy as np
import pytest
from launching import Results, horovod_job

from ef_horovod.wire import size_class

pytestmark = pytest.mark.parallel

RANKS, TABLE, WIDTH, STEPS = 3, 300, 8, 4
ROW_NBYTES = 8 + 4 * WIDTH  # an int64 index and float32 values


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(RANKS, "sparse_rows.py", tmp_path_factory.mktemp("sparse"))


@pytest.mark.parametrize("how", ["means", "sums", "accumulated", "none_on_one_rank", "halves"])
def test_rows_add_up_to_what_dense_gradients_would(how: str, results: Results) -> None:
    for result in results:
        facts = result[how]
        assert facts["wrong"] < (1e-2 if how == "halves" else 1e-6)
        assert facts["once"] == [True] * STEPS, "a row is missing, there twice, or dense"
        assert facts["end"] == results[0][how]["end"]
        assert facts["memories"] == ["head.weight"], "rows have no error-feedback state"


@pytest.mark.parametrize("how", ["means", "none_on_one_rank"])
def test_bytes_of_rows_are_those_that_each_rank_touched(how: str, results: Results) -> None:
    touched = results[0][how]["touched"]  # [step][rank]
    assert (touched[0][1] == 0) == (how == "none_on_one_rank")
    # A message begins with the number of its rows.
    nbytes = np.array([[size_class(8 + rows * ROW_NBYTES) for rows in step] for step in touched])
    for rank, result in enumerate(results):
        own = int(nbytes[:, rank].sum())
        expected = [(RANKS - 1) * own, int(nbytes.sum()) - own]
        assert result[how]["stats"] == ["rows.table.weight", STEPS, TABLE * WIDTH, *expected]
        ring = 2 * (RANKS - 1) * (TABLE * WIDTH * 4) // RANKS
        assert result[how]["dense_bytes"] == STEPS * ring


def test_a_nan_in_one_rank_s_row_drops_the_step_on_all(results: Results) -> None:
    for result in results:
        facts = result["not_finite"]
        assert facts["kept"] == [True], "parameters or memories changed"
        assert facts["nan"] == [True, True]
        assert facts["ends"] == [results[0]["not_finite"]["ends"][0]] * 2
        assert facts["skipped"] == 1


def test_rows_are_free_of_the_loss_scale(results: Results) -> None:
    for result in results:
        assert result["loss_scale"] == [results[0]["loss_scale"][0]] * 2


def test_the_usual_scaler_recipe_is_as_without_a_scaler(results: Results) -> None:
    for result in results:
        for plain, scaled in result["usual_recipes"]:
            assert plain == scaled  # scales are powers of two


def test_sparse_adam_trains_as_on_all_data(results: Results) -> None:
    for result in results:
        facts = result["sparse_adam"]
        assert facts["wrong"] < 1e-5 < 0.1 < facts["moved"]
        assert facts["end"] == results[0]["sparse_adam"]["end"]


def test_a_resumed_run_knows_which_gradients_are_rows(results: Results) -> None:
    for result in results:
        assert result["resumed"] == [results[0]["resumed"][0]] * 2


def test_a_gradient_of_two_kinds_is_refused_on_all_ranks(results: Results) -> None:
    for result in results:
        assert result["both_kinds"] == (
            "UnsupportedError: the gradient of 'table.weight' is sparse in 1 dimension(s), "
            "expected it dense as in the first step and on all ranks; build the embedding with "
            "sparse=False, or pass sparse_as_dense=True"
        )
        now_dense, now_sparse = result["another_kind_later"]
        assert "'table.weight' is dense, expected it sparse in 1 dimension(s)" in now_dense
        assert "'table.weight' is sparse in 1 dimension(s), expected it dense" in now_sparse


def test_single_entries_travel_likewise(results: Results) -> None:
    for result in results:
        facts = result["entries"]
        assert facts["moved"] == [[0, 0], [0, 1], [0, 2], [0, 7]]
        assert facts["values"] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2])


def test_the_stock_optimizer_gathers_rows_itself(results: Results) -> None:
    for result in results:
        facts = result["stock"]
        assert facts["digest"] == facts["resumed"] == results[0]["stock"]["digest"]
        assert facts["sparse"]
        assert facts["elements"] == 2 * [48 * 30 + 30]  # without the table
        assert "got a dense gradient of 'table.weight', which had none" in facts["dense later"]


def test_only_the_ranks_of_the_set_share_rows(results: Results) -> None:
    first, outside, second = (result["process_set"] for result in results)
    assert first == second != outside
