"""Every method keeps its contract with every compressor that it takes; see methods/base.py."""

from __future__ import annotations

import numpy as np
import pytest
from workers import COMPRESSORS, METHODS, D, channels, float32_zeros, gradients, run_channels

import ef_horovod as ef
from ef_horovod.methods import registry
from ef_horovod.testing import each_method_check
from ef_horovod.testing.frameworks import OneChannel
from ef_horovod.training.buckets import one_slot, plan_buckets
from ef_horovod.training.state import read_state

CASES = [
    pytest.param(check, id=f"{check.func.__name__}-{'-'.join(map(repr, check.args))}")
    for method in METHODS
    for check in each_method_check(method, ("numpy", "torch"))
]


def test_registry_gives_methods_for_all_compressors():
    assert {type(method).__name__ for method in METHODS} == set(registry.METHODS)
    assert len(registry.METHODS) >= 7
    for compressor in COMPRESSORS:
        assert any(method.compressor == compressor for method in METHODS)


def factors(check):
    """The method apart from its compressor, the compressor, and what is checked."""
    method, *more = check.args
    kind = repr(method).replace(repr(method.compressor), "C")
    return kind, method.compressor, (check.func.__name__, *more)


@pytest.mark.covering(factors=factors)
@pytest.mark.parametrize("check", CASES)
def test_method_keeps_the_contract(check):
    check()


def test_a_checkpoint_holds_each_workers_vectors_and_no_scratch():
    (channel,) = channels(ef.EF21Plus(ef.TopK(k=3)), 1)
    run_channels([channel], gradients(1, 1)[0], 0)
    saved = read_state([OneChannel(channel, one_slot("w", float32_zeros(D)))])
    assert saved["w"].keys() == {"worker.tracked", "server.tracked.0"}
    assert np.count_nonzero(saved["w"]["server.tracked.0"]) == 3


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (ef.EF21(ef.TopK(k=3)), None),
        (ef.ErrorFeedback(ef.TopK(k=3)), None),
        (ef.DoubleSqueeze(ef.TopK(k=3)), None),
        (ef.PerturbedCompressedSGD(ef.TopK(k=3)), None),
        (
            ef.PerturbedCompressedSGD(ef.TopK(k=3), noise=0.1, reset_every=2),
            ef.PerturbedCompressedSGD(ef.Identity(), noise=0.1),
        ),
        (
            ef.ErrorCompensatedX(ef.TopK(k=3), server_compressor=ef.TopK(k=5), alpha=0.25),
            ef.ErrorCompensatedX(ef.Identity(), alpha=0.25, beta=1.0),
        ),
    ],
    ids=repr,
)
def test_parameters_that_stay_dense_are_treated_alike(method, expected):
    """Averaging and noise are no compression: small parameters need them too."""
    plans = plan_buckets(
        [("w", float32_zeros(50)), ("b", float32_zeros(5))],
        method,
        dense=lambda name, _: name == "b",
        bucket_bytes=1 << 20,
        device_of=lambda _: None,
    )
    assert [plan.method for plan in plans] == [expected, method]
