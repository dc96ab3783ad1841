"""Gradients of embeddings (`tf.IndexedSlices`), on three ranks."""

from __future__ import annotations

import numpy as np
import pytest
from launching import Results, horovod_job

from ef_horovod.wire import size_class

pytestmark = pytest.mark.parallel

RANKS, WIDTH = 3, 5
ROW_NBYTES = 8 + 4 * WIDTH  # an int64 index and float32 values


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(RANKS, "tf_sparse.py", tmp_path_factory.mktemp("sparse"))


@pytest.mark.parametrize("how", ["rows", "summed", "none_on_one_rank"])
def test_rows_add_up_to_what_dense_gradients_would(how: str, results: Results) -> None:
    for result in results:
        facts = result[how]
        assert facts["kind"] == "IndexedSlices"
        assert facts["once"] == [True] * 3, "a row is missing, or there twice"
        assert facts["wrong"] < 1e-6 < 0.1 < facts["largest"]


def test_a_sum_of_rows_is_the_mean_times_the_ranks(results: Results) -> None:
    mean, total = results[0]["rows"]["largest"], results[0]["summed"]["largest"]
    assert total == pytest.approx(RANKS * mean)


@pytest.mark.parametrize("how", ["rows", "none_on_one_rank"])
def test_bytes_of_rows_are_those_that_each_rank_touched(how: str, results: Results) -> None:
    touched = results[0][how]["touched"]  # [step][rank]
    assert (touched[0][1] == 0) == (how == "none_on_one_rank")
    # A message begins with the number of its rows.
    nbytes = np.array([[size_class(8 + rows * ROW_NBYTES) for rows in step] for step in touched])
    for rank, result in enumerate(results):
        facts = result[how]
        assert facts["touched"] == touched
        assert facts["steps"] == 3
        sent = (RANKS - 1) * nbytes[:, rank].sum()
        received = nbytes.sum() - nbytes[:, rank].sum()
        ring = 3 * 2 * (RANKS - 1) * (60 * WIDTH * 4) // RANKS
        assert facts["bytes"] == [sent, received, ring]


def test_a_nan_in_one_rank_s_row_drops_the_step_on_all(results: Results) -> None:
    for result in results:
        facts = result["not_finite"]
        assert facts["all_nan"]
        assert facts["memories"], "a memory or the step counter has changed"
        assert facts["ends"][0] == facts["ends"][1] == results[0]["not_finite"]["ends"][0]
        assert facts["skipped"] == 1


def test_sparse_as_dense_compresses_them_like_dense_gradients(results: Results) -> None:
    for result in results:
        facts = result["as_dense"]
        assert facts["ends"][0] == facts["ends"][1] == results[0]["as_dense"]["ends"][0]
        assert facts["names"][0] == facts["names"][1]
        assert facts["names"][0][0] == ["bucket.0", 60 * WIDTH + 1600]
        assert facts["nonzero"] > 0


def test_an_embedding_trains_in_model_fit_as_on_all_data(results: Results) -> None:
    for result in results:
        facts = result["fit"]
        assert facts["end"] == results[0]["fit"]["end"]
        assert facts["wrong"] < 1e-5 < 0.01 < facts["moved"]
        assert "rows.0.embeddings" in facts["rows"]
