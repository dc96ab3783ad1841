"""TensorFlow: all ranks hold the same bits, from one trace, and compute what NumPy computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import Results, alone, horovod_job
from one_of_each import chosen

pytestmark = pytest.mark.parallel

FAST_CYCLE = {"HOROVOD_CYCLE_TIME": "0.2"}
LOOPS = [
    "tape_in_a_function",
    "keras_apply",
    "keras_apply_gradients",
    "tf_keras_loop",
    "stock_tape",
]
FITS = [
    "keras_fit_of_single_steps",
    "keras_fit_of_several_steps_at_once",
    "tf_keras_fit_of_single_steps",
    "stock_tf_keras_fit",
]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.exhaustive)])
def ways(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Every way to train, by every rank."""
    out = tmp_path_factory.mktemp("ways")
    return horovod_job(request.param, "tf_equal.py", out, timeout=400, environment=FAST_CYCLE)


@pytest.mark.parametrize("way", [*LOOPS, *FITS, "tape_in_eager_mode"])
def test_all_ranks_end_with_the_same_bits(way: str, ways: Results) -> None:
    first = ways[0][way]
    assert first["start"] != first["end"]
    assert first["accuracy"] > 0.4, "by chance it is 0.1"
    assert first["steps"] == (30 if way == "tape_in_eager_mode" else 60)
    assert first["ratio"] < 0.4, "hardly less was sent than without compression"
    for rank, result in enumerate(ways):
        assert result[way]["start"] == first["start"]
        assert result[way]["end"] == first["end"], f"rank {rank} differs"


@pytest.mark.parametrize("way", LOOPS)
def test_a_function_is_traced_once(way: str, ways: Results) -> None:
    assert [result[way]["traces"] for result in ways] == [1] * len(ways)


@pytest.mark.parametrize("way", FITS)
def test_fit_traces_as_often_as_with_a_plain_optimizer(way: str, ways: Results) -> None:
    for result in ways:
        family = "tf_keras" if "tf_keras" in way else "keras"
        assert result[way]["traces"] == result["traces_of_plain_optimizers"][family]


def compresses(method: str) -> bool:
    return "Identity" not in method or method.startswith("PowerSGD")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "ranks", "steps"),
    [
        ("methods", 2, 80),  # test_frameworks.py has every class of compressors in a graph
        *(pytest.param("selection", ranks, 120, marks=pytest.mark.exhaustive) for ranks in (2, 3)),
    ],
)
def test_every_compressor_and_every_method(
    which: str, ranks: int, steps: int, tmp_path: Path
) -> None:
    words = (which, str(steps))
    results = horovod_job(
        ranks, "tf_pairs.py", tmp_path, *words, timeout=600, environment=FAST_CYCLE
    )
    assert set(results[0]) == set(map(repr, chosen(which)))
    for method, first in results[0].items():
        assert first["start"] != first["end"], f"{method} did not train"
        assert first["loss"] < 0.8 * first["loss at start"], f"{method} did not learn"
        assert first["steps"] == steps
        assert first["traces"] == 1, f"{method} was traced again"
        if compresses(method):
            assert 0 < first["bytes"] < first["dense bytes"], f"{method} sent too much"
        for rank, other in enumerate(results):
            assert other[method]["end"] == first["end"], f"{method}: rank {rank} differs"


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(2, "tf_numbers.py", tmp_path_factory.mktemp("numbers"))


def test_methods_give_the_bits_that_numpy_gives(numbers: Results) -> None:
    for result in numbers:
        same = result["methods_as_in_numpy"]
        assert len(same) == 10  # five methods, in a graph and in eager mode
        assert set(same.values()) == {6}, f"of 6 steps: {same}"


def test_without_compression_averages_are_averages(numbers: Results) -> None:
    for result in numbers:
        assert len(result["averages"]) == 6
        assert set(result["averages"].values()) == {0.0}


def test_tapes_give_the_mean_of_the_ranks_gradients(numbers: Results) -> None:
    for result in numbers:
        distances = result["gradients_of_a_model"]
        assert distances["ef"] == distances["stock"] == 0.0
        assert distances["alone"] > 0.01, "ranks have the same gradients: this shows nothing"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return alone("tf_single_rank.py", tmp_path_factory.mktemp("single"))


@pytest.mark.parametrize("way", ["keras.fit", "tf_keras.fit", "tape"])
def test_one_rank_is_plain_tensorflow(way: str, single: dict) -> None:
    plain, *wrapped = single[way]
    assert len(wrapped) >= 2
    assert set(wrapped) == {plain}
    assert plain != single["start"]


def test_one_rank_has_nothing_to_report(single: dict) -> None:
    assert single["logs"] == {"stats": [], "logs": ["loss"]}
