"""Several ranks on a node in TensorFlow: ranks stay equal and drop steps together."""

from __future__ import annotations

import pytest
from launching import Results, horovod_job
from same_gradients import cases_by_nodes, digest, simulated_by_nodes

pytestmark = [pytest.mark.parallel, pytest.mark.slow]


@pytest.fixture(
    scope="module",
    params=[
        ("mpi", 2, 2),
        pytest.param(("gloo", 2, 2), marks=pytest.mark.exhaustive),
        pytest.param(("gloo", 1, 2), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def results(
    request: pytest.FixtureRequest, every_case: bool, tmp_path_factory: pytest.TempPathFactory
) -> Results:
    """By Horovod's library, and the ranks on each host."""
    library, *hosts = request.param
    words = ["singles" if every_case else "few", *["pretend"] * (library == "mpi")]
    return horovod_job(
        sum(hosts), "tf_nodes.py", tmp_path_factory.mktemp("tf_nodes"), *words,
        gloo=library == "gloo", hosts=hosts, timeout=900,
    )  # fmt: skip


def test_ranks_stay_equal_and_drop_the_same_step(results: Results) -> None:
    assert len(results[0]["found"]) == 9
    for case, first in results[0]["found"].items():
        if "auto" in case and len(results) == 3:  # it does not know unequal nodes
            assert "gather" in first["exchanges"]
        else:
            assert any(name.startswith("hierarchical:") for name in first["exchanges"]), case
        for result in results:
            assert result["found"][case]["bits"] == first["bits"], case
            skipped = result["found"][case]["skipped"]
            # With Horovod's tape, each variable drops its own steps.
            assert (max(skipped), min(skipped)) == (1, 0 if case.startswith("tape") else 1)


def test_graphs_have_the_numbers_of_one_process(results: Results) -> None:
    same = [f["same"] for r in results for f in r["found"].values() if "same" in f]
    assert all(same)
    assert len(same) == (4 * 7 if len(results) == 4 else 0)


def test_eager_steps_and_graphs_have_the_same_bits(results: Results) -> None:
    eager, graph = list(results[0]["found"].values())[:2]
    assert eager["bits"] == graph["bits"]


@pytest.mark.exhaustive
def test_every_method_and_compressor(results: Results) -> None:
    """The same bits on all ranks, and those of the simulation where it has such nodes."""
    expected = results[0]["every_method"]
    if len(results) == 4:
        expected = {
            f"{method} by {exchange}": digest(simulated_by_nodes(method, exchange, "bucket.0"))
            for method, exchange in cases_by_nodes("singles")
        }
    assert len(expected) == len(cases_by_nodes("singles"))
    for rank, result in enumerate(results):
        found = result["every_method"]
        different = [name for name, end in expected.items() if found[name] != end]
        assert not different, f"rank {rank}: {len(different)} of {len(found)} differ: {different}"
