"""What Horovod's own tests do with an optimizer, with `ef.DistributedOptimizer` in its place."""

from __future__ import annotations

from typing import Any

import pytest
from launching import Results, horovod_job

pytestmark = pytest.mark.parallel

OURS = ["identity", "topk"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(3, "horovods_own.py", tmp_path_factory.mktemp("own"))


def require_as_horovod(how: str, what: str, results: Results, name: str = "") -> None:
    """Ranks end with the same bits; uncompressed, where Horovod ends."""
    here, there = ([result[key][what] for result in results] for key in (how, "horovod"))
    if name:
        here, there = ([facts[name] for facts in ranks] for ranks in (here, there))
    assert [facts["end"] for facts in here] == [here[0]["end"]] * len(results), name
    if how == "identity":
        assert here[0]["some"] == pytest.approx(there[0]["some"], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("how", OURS)
def test_what_rank_0_restores_is_broadcast_for_every_optimizer(how: str, results: Results) -> None:
    names = list(results[0][how]["broadcast_state"])
    assert len(names) >= 24
    for name in names:
        assert all(result[how]["broadcast_state"][name]["restored"] for result in results), name
        require_as_horovod(how, "broadcast_state", results, name)


@pytest.mark.parametrize("how", OURS)
def test_options_of_rank_0_are_broadcast_with_their_types(how: str, results: Results) -> None:
    for name in results[0][how]["broadcast_options"]:
        assert not any(result[how]["broadcast_options"][name]["wrong"] for result in results), name
        require_as_horovod(how, "broadcast_options", results, name)


@pytest.mark.parametrize("how", OURS)
def test_a_parameter_without_gradient_stays_without_one(how: str, results: Results) -> None:
    assert all(result[how]["without_gradient"]["frozen"] for result in results)
    require_as_horovod(how, "without_gradient", results)


@pytest.mark.parametrize("how", OURS)
def test_gradients_are_clipped_between_synchronize_and_step(how: str, results: Results) -> None:
    before, after, *_ = results[0][how]["clipping"]["some"]
    assert abs(before) > abs(after)
    require_as_horovod("identity", "clipping", results)
    require_as_horovod(how, "clipping", results)


@pytest.mark.parametrize("how", OURS)
def test_names_may_be_left_out_but_not_be_missing_or_twice(how: str, results: Results) -> None:
    for result in results:
        few, twice = result[how]["names"]["errors"]
        assert few.startswith("ValueError: got named_parameters without 3 of the optimizer's 4")
        assert twice.startswith("ValueError: got the same name more than once")
    require_as_horovod(how, "names", results)


@pytest.mark.parametrize("how", OURS)
def test_gradients_may_be_turned_off_and_on(how: str, results: Results) -> None:
    assert [result[how]["dynamic_requires_grad"]["wrong"] for result in results] == [[]] * 3
    require_as_horovod(how, "dynamic_requires_grad", results)


@pytest.mark.parametrize("as_dense", ["as_dense=False", "as_dense=True"])
@pytest.mark.parametrize("how", OURS)
def test_sparse_embeddings_train_with_sparse_adam(
    how: str, as_dense: str, results: Results
) -> None:
    require_as_horovod(how, "sparse_embeddings", results, as_dense)


@pytest.mark.parametrize("how", OURS)
def test_optimizers_of_a_process_set_leave_the_other_ranks_alone(
    how: str, results: Results
) -> None:
    first, outside, second = (ends(result, how) for result in results)
    assert first == second != outside
    if how == "identity":
        horovods = results[0]["horovod"]["process_sets"]["some"]
        assert results[0][how]["process_sets"]["some"] == pytest.approx(horovods, rel=1e-3)


def ends(result: dict[str, Any], how: str) -> str:
    return result[how]["process_sets"]["end"]
