"""The double pass in TensorFlow: graphs, eager mode, Keras and the stock tape."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launching import Results, horovod_job
from processes import JobFailed

pytestmark = [pytest.mark.parallel, pytest.mark.slow]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.exhaustive)])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("double_pass")
    return horovod_job(request.param, "tf_double_pass.py", out, timeout=600)


def test_ranks_stay_equal(results: Results) -> None:
    first = results[0]["trainings"]
    assert len(first) == 10
    assert results[0]["start"] not in first.values(), "something did not train"
    assert len(set(first.values())) > 4, "methods end alike"  # in a graph and eagerly they may
    assert all(result["trainings"] == first for result in results)


def test_the_numbers_and_bytes_are_those_of_one_process(results: Results) -> None:
    for result in results:
        assert len(result["as_in_one_process"]) == 8
        assert all(facts["same"] for facts in result["as_in_one_process"].values())
    for name, facts in results[0]["as_in_one_process"].items():
        sent = [result["as_in_one_process"][name]["sent"] for result in results]
        assert sum(sent) // len(sent) == facts["simulated"], name


def test_a_step_with_a_nan_on_one_rank_leaves_no_trace(results: Results) -> None:
    for result in results:
        assert len(result["not_finite"]) == 2
        for facts in result["not_finite"].values():
            assert facts == {"same": True, "skipped": 1}


def test_a_resumed_training_ends_as_an_uninterrupted_one(results: Results) -> None:
    assert len({end for result in results for end in result["resumed"]}) == 1


def test_keras_fit_with_sparse_rows_beside(results: Results) -> None:
    for result in results:
        assert result["by_keras"] == results[0]["by_keras"]
        assert result["by_keras"]["start"] != result["by_keras"]["end"]
        assert result["by_keras"]["rows"]["bucket.0"] == "double_pass"
        assert len(result["by_keras"]["rows"]) > 3, "no rows of the embedding"


def test_what_looks_at_matrices_is_refused(results: Results) -> None:
    for result in results:
        assert "UnsupportedError: got exchange='double_pass' with PowerSGD" in result["refused"]


@pytest.mark.parametrize(
    "where", [pytest.param("function sliced", marks=pytest.mark.exhaustive), "eager sliced"]
)
def test_a_rank_that_does_not_come_ends_the_job(where: str, tmp_path: Path) -> None:
    with pytest.raises(JobFailed) as failure:
        horovod_job(
            2, "tf_missing_rank.py", tmp_path, *where.split(), timeout=95,
            environment={"EF_HOROVOD_TIMEOUT": "8"},
        )  # fmt: skip
    output = re.sub(r"\[1,\d\]<std(out|err)>: ?", "", str(failure.value))
    assert "did not end within" not in output
    assert "ef_horovod: rank 0 of 2 waited 8 s in 'ef0.bucket.0'" in output
