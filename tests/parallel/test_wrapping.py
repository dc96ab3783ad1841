"""Wrapped optimizers load, freeze and copy as plain ones do, or say that they cannot."""

from __future__ import annotations

import pytest
from launching import Results, horovod_job

pytestmark = pytest.mark.parallel

KINDS = ["sgd", "sam", "lookahead", "lookahead of sam", "front", "in place", "combined"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(2, "wrapping.py", tmp_path_factory.mktemp("wrapping"))


@pytest.mark.parametrize("kind", KINDS)
def test_learning_rates_arrive_after_a_load(kind: str, results: Results) -> None:
    for result in results:
        facts = result["rates"][kind]
        assert facts["distances"]["groups"] == 0.0
        assert facts["distances"]["earlier"] > 0.0
        assert facts["distances"]["later"] == 0.0
        assert facts["end"] == results[0]["rates"][kind]["end"]


def test_a_layer_is_frozen_by_wrapping_again(results: Results) -> None:
    for result in results:
        facts = result["freezing"]
        assert facts["type"], "not a plain optimizer again"
        assert facts["other"] == []
        assert facts["idle"], "an optimizer that is not wrapped any more took gradients"
        assert facts["still"], "a frozen parameter moved"
        assert facts["lr"] == 0.05, "the scheduler did not reach the optimizer"
        assert facts["momentum"] == 7
        assert facts["end"] == results[0]["freezing"]["end"]


def test_a_copy_has_the_state_and_no_exchange(results: Results) -> None:
    for result in results:
        facts = result["copies"]
        for use in ("step", "synchronize", "skip", "pickled"):
            assert "call unwrap() on the copy and wrap it again" in facts[use]
        assert facts["kept"], "a copy took a step"
        assert facts["states"] == 1
        assert "wrapped already" in facts["again"]
        assert facts["ends"] == results[0]["copies"]["ends"]
