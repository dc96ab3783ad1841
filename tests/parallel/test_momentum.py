"""MomentumCorrection and FrozenAdam in training loops: against the optimizers, and refusals."""

from __future__ import annotations

import pytest
from launching import Results, horovod_job

pytestmark = pytest.mark.parallel

NAMED = "with momentum=0.9, expected momentum in one of them"


@pytest.fixture(scope="module", params=[1, 2])
def torch_results(request, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(request.param, "momentum.py", tmp_path_factory.mktemp("momentum"))


@pytest.fixture(scope="module", params=[2, pytest.param(1, marks=pytest.mark.exhaustive)])
def tensorflow_results(request, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return horovod_job(request.param, "tf_momentum.py", tmp_path_factory.mktemp("momentum"))


def test_pytorch_ends_where_sgd_with_momentum_does(torch_results: Results) -> None:
    """With SGD's weight decay too, and for small parameters."""
    for result in torch_results:
        for form, facts in result["without_compression"].items():
            assert facts["off"] < 1e-5 < 0.1 < facts["moved"], form


def test_keras_ends_where_sgd_with_momentum_does(tensorflow_results: Results) -> None:
    for result in tensorflow_results:
        for form, facts in result["without_compression"].items():
            assert facts["off"] < 1e-5 < 0.1 < facts["moved"], form


def check_adam(results: Results) -> None:
    for result in results:
        facts = result["adam"]
        assert facts["off, 20"] < 1e-5 < 0.01 < facts["moved"]
        if len(results) > 1:  # one rank compresses nothing
            assert 1e-5 < facts["off, 12"] < 0.3 * facts["moved"]


def test_the_dense_steps_of_frozen_adam_end_where_adamw_of_pytorch_does(
    torch_results: Results,
) -> None:
    check_adam(torch_results)


def test_the_dense_steps_of_frozen_adam_end_where_adamw_of_keras_does(
    tensorflow_results: Results,
) -> None:
    check_adam(tensorflow_results)


def test_sums_over_ranks_have_the_updates_of_averages(torch_results: Results) -> None:
    for result in torch_results:
        ends = result["sums"]
        assert ends[::2] == ends[1::2]


def check_refusals_of_adam(results: Results) -> None:
    for result in results:
        facts = result["of_adam"]
        assert "got an optimizer with the rule of AdamW and FrozenAdam(OneBit()" in facts["AdamW"]
        assert "got an optimizer with momentum=0.5 and FrozenAdam(" in facts["momentum"]
        if len(results) > 1:
            assert "with dense_steps=0, expected some dense" in facts["dense steps"]


def test_beside_frozen_adam_only_plain_sgd_of_pytorch_is_taken(torch_results: Results) -> None:
    check_refusals_of_adam(torch_results)
    for result in torch_results:
        assert "got synchronize() with " in result["of_adam"]["synchronize"]


def test_beside_frozen_adam_only_plain_sgd_of_keras_is_taken(tensorflow_results: Results) -> None:
    check_refusals_of_adam(tensorflow_results)
    for result in tensorflow_results:
        facts = result["of_adam"]
        assert "with global_clipnorm=1.0 and FrozenAdam(" in facts["clipping"]
        if len(tensorflow_results) > 1:
            assert "got new values of variables after 1 steps" in facts["broadcast"]


def test_a_resumed_run_ends_as_an_uninterrupted_one(torch_results: Results) -> None:
    for result in torch_results:
        facts = result["checkpoint"]
        assert facts["whole"] == facts["again"]
        assert "0.weight" in facts["decays"]
        assert "0.bias" in facts["decays"]


def test_a_second_momentum_is_refused_by_name(torch_results: Results) -> None:
    for result in torch_results:
        facts = result["refusals"]
        for what in ("momentum", "later"):
            assert facts[what].startswith("UnsupportedError: got an optimizer with momentum=0.5 ")
            assert NAMED in facts[what]
        assert "with betas=(0.9, 0.999) and MomentumCorrection(" in facts["betas"]
        if len(torch_results) == 1:
            assert "in ef.Compression with one rank, expected more" in facts["stock"]
            continue
        assert NAMED in facts["stock, momentum"]
        assert "got weight_decay=0.1 beside Mom" in facts["stock, weight decay"]
        assert facts["stock"] == ""
        assert "is sparse with MomentumCorrection(" in facts["sparse"]


def test_so_it_is_in_tensorflow(tensorflow_results: Results) -> None:
    for result in tensorflow_results:
        facts = result["refusals"]
        for what in ("momentum", "loss scale", "tf_keras"):
            assert facts[what].startswith("UnsupportedError: got an optimizer with momentum=0.5 ")
            assert NAMED in facts[what]
        assert "got an optimizer with beta_1=0.9 and" in facts["beta_1"]
        assert facts["plain"] == facts["sparse as dense"] == ""
        assert "is sparse with MomentumCorrection(" in facts["sparse"]
        expected = "with one rank, expected more" if len(tensorflow_results) == 1 else ""
        assert expected in facts["stock"]
        assert bool(expected) == bool(facts["stock"])
