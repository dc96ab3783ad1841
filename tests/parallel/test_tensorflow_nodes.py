"""Several ranks on a node in TensorFlow: ranks stay equal and drop steps together."""

from __future__ import annotations

import pytest
from launching import Results, horovod_job

pytestmark = [pytest.mark.parallel, pytest.mark.slow]


@pytest.fixture(
    scope="module",
    params=[(2, 2), pytest.param((1, 2), marks=pytest.mark.exhaustive)],
    ids=["2+2", "1+2"],
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    out, hosts = tmp_path_factory.mktemp("tf_nodes"), request.param
    return horovod_job(sum(hosts), "tf_nodes.py", out, gloo=True, hosts=hosts, timeout=400)


def test_ranks_stay_equal_and_drop_the_same_step(results: Results) -> None:
    assert len(results[0]["found"]) == 5
    for case, first in results[0]["found"].items():
        assert any(name.startswith("hierarchical:") for name in first["exchanges"]), case
        for result in results:
            assert result["found"][case]["bits"] == first["bits"], case
            skipped = result["found"][case]["skipped"]
            # With Horovod's tape, each variable drops its own steps.
            assert (max(skipped), min(skipped)) == (1, 0 if case.startswith("tape") else 1)


def test_graphs_have_the_numbers_of_one_process(results: Results) -> None:
    same = [f["same"] for r in results for f in r["found"].values() if "same" in f]
    assert all(same)
    assert len(same) == (12 if len(results) == 4 else 0)


def test_eager_steps_and_graphs_have_the_same_bits(results: Results) -> None:
    eager, graph = list(results[0]["found"].values())[:2]
    assert eager["bits"] == graph["bits"]


def test_dense_steps_are_refused_with_the_way_out(results: Results) -> None:
    for result in results:
        assert result["refused"].startswith("UnsupportedError: got dense_steps=5 with exchange=")
        assert "leave dense_steps out" in result["refused"]
