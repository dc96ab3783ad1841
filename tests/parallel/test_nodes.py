"""Several ranks on a node in PyTorch: ranks stay equal, drop steps together, and resume."""

from __future__ import annotations

from typing import Any

import pytest
from launching import Results, horovod_job
from same_gradients import cases_by_nodes, digest, simulated_by_nodes

pytestmark = [pytest.mark.parallel, pytest.mark.slow]


@pytest.fixture(
    scope="module",
    params=[
        ("gloo", 2, 2),
        pytest.param(("mpi", 2, 2), marks=pytest.mark.exhaustive),
        pytest.param(("gloo", 2, 1, 3), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def way(request: pytest.FixtureRequest) -> tuple[Any, ...]:
    """Horovod's library, and the ranks on each host."""
    return request.param


@pytest.fixture(scope="module")
def hosts(way: tuple[Any, ...]) -> tuple[int, ...]:
    return way[1:]


@pytest.fixture(scope="module")
def results(
    way: tuple[Any, ...], every_case: bool, tmp_path_factory: pytest.TempPathFactory
) -> Results:
    library, *hosts = way
    words = ["all" if every_case else "singles", *["pretend"] * (library == "mpi")]
    return horovod_job(
        sum(hosts), "nodes.py", tmp_path_factory.mktemp("nodes"), *words,
        gloo=library == "gloo", hosts=hosts, timeout=900,
    )  # fmt: skip


def test_parameters_are_equal_on_all_ranks(results: Results) -> None:
    first = results[0]["trainings"]
    assert len(first) == 6
    for method, end in first.items():
        assert end["loss"] < 2.1, f"{method} did not learn"  # at the start it is about log(10)
        assert any(name.startswith("hierarchical:") for name in end["exchanges"]), method
        for rank, result in enumerate(results):
            assert result["trainings"][method]["end"] == end["end"], f"{method}: rank {rank}"


def test_every_method_and_compressor(
    results: Results, hosts: tuple[int, ...], every_case: bool
) -> None:
    """The same bits on all ranks, and those of the simulation where it has such nodes."""
    cases = cases_by_nodes("all" if every_case else "singles")
    expected = {f"{m} by {exchange}": results[0]["every_method"][f"{m} by {exchange}"]
                for m, exchange in cases}  # fmt: skip
    if hosts == (2, 2):
        expected = {
            f"{method} by {exchange}": digest(simulated_by_nodes(method, exchange, f"x{i}"))
            for i, (method, exchange) in enumerate(cases)
        }
    assert len(set(expected.values())) > len(expected) / 3
    for rank, result in enumerate(results):
        found = result["every_method"]
        assert found.keys() == expected.keys()
        different = [name for name, end in expected.items() if found[name] != end]
        assert not different, f"rank {rank}: {len(different)} of {len(found)} differ: {different}"


def test_the_numbers_and_bytes_are_those_of_one_process(
    results: Results, hosts: tuple[int, ...]
) -> None:
    if hosts != (2, 2):
        pytest.skip("sums over these nodes are rounded")
    for result in results:
        assert len(result["as_in_one_process"]["same"]) == 6
        assert all(result["as_in_one_process"]["same"].values())
    for method, (_, simulated) in results[0]["as_in_one_process"]["sent"].items():
        sent = [result["as_in_one_process"]["sent"][method][0] for result in results]
        assert sum(sent) // len(sent) == simulated, method


def test_the_direction_is_the_mean_over_ranks(results: Results) -> None:
    assert all(result["mean_over_ranks"] < 1e-6 for result in results)


def test_a_gradient_that_is_not_finite_drops_the_step_on_all_ranks(results: Results) -> None:
    for result in results:
        for adapter, facts in result["not_finite"].items():
            assert facts["kept"], f"{adapter}: parameters or memories changed"
            assert facts["skipped"] == 1
            assert facts["end"] == results[0]["not_finite"][adapter]["end"]


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    results: Results, hosts: tuple[int, ...]
) -> None:
    for rank, result in enumerate(results):
        assert result["resumed"]["whole"] == result["resumed"]["again"]
        assert result["resumed"]["whole"] == results[0]["resumed"]["whole"]
        if hosts == (2, 2):
            assert result["resumed"]["held"] == [f"slice.{rank % 2}.worker.error"]
    states = [result["resumed"]["elements"] for result in results]
    assert sum(states) == len(hosts) * (40 * 60 + 60 * 50)  # one rank's a node; 500 stay dense


def test_what_cannot_work_is_refused_with_the_way_out(
    results: Results, way: tuple[Any, ...]
) -> None:
    for result in results:
        matrices, disagreement = result["refused"]
        assert matrices.startswith("UnsupportedError: got exchange='hierarchical' with PowerSGD")
        assert disagreement.startswith("ConfigMismatchError: rank 0 has exchange='hierarchical'")
        assert "rank 1 has" in disagreement
        if way[0] == "gloo":
            assert result["fixed"].startswith(
                "UnsupportedError: got exchange='hierarchical' in a job whose process sets are "
                "fixed"
            )
            assert "write hvd.init(process_sets='dynamic')" in result["fixed"]


def test_a_wait_ends_with_a_message(results: Results) -> None:
    """Which names the rank by its number in the job."""
    for rank, result in enumerate(results[:-1]):
        seconds, _, error = result["missing_rank"].partition(" ")
        assert 3.0 <= float(seconds) < 8.0
        start = f"CollectiveTimeoutError: rank {rank} "
        assert error.startswith((start + "among ranks [", start + f"of {len(results)} waited 3 s"))
