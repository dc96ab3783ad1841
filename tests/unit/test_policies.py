"""Policies that give parameters methods of their own, and ready ones."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

import ef_horovod as ef
from ef_horovod.exchange.dense import UNCOMPRESSED
from ef_horovod.testing.workers import gradients, run_channels
from ef_horovod.training.buckets import describe, plan_buckets, plan_one
from ef_horovod.training.driver import StepDriver
from ef_horovod.training.momentum import for_one_rank
from ef_horovod.training.policies import by_name, dense_below, dense_unless_smaller
from ef_horovod.training.policy import require_answers, warn_of_surprises
from ef_horovod.transports.local import local_group

METHOD, OTHER = ef.ErrorFeedback(ef.TopK(ratio=0.1)), ef.EF21(ef.OneBit())
SHAPES = {
    "embed.weight": (100, 20),
    "0.weight": (40, 50),
    "0.bias": (40,),
    "1.weight": (50, 40),
    "head.weight": (10, 300),
    "head.bias": (10,),
}
NAMED = [(name, np.zeros(shape, np.float32)) for name, shape in SHAPES.items()]
POLICY = by_name({"embed.*": "dense", "head.bias": "compressed", "*.weight": OTHER, "0.*": OTHER})


def plans_of(dense, method=METHOD, **options):
    return plan_buckets(
        NAMED, method, dense=dense, bucket_bytes=1 << 20, device_of=lambda _: None, **options
    )


def contents(plans):
    return [(p.name, p.method, [slot.name for slot in p.slots], p.dense_steps) for p in plans]


def test_each_method_has_its_buckets():
    """The first pattern that fits decides; the usual method's buckets come first."""
    assert contents(plans_of(POLICY, dense_steps=3)) == [
        ("dense.0", None, ["embed.weight"], 0),
        ("bucket.0", METHOD, ["head.bias"], 3),
        ("bucket.1", OTHER, ["head.weight", "1.weight", "0.bias", "0.weight"], 3),
    ]


def test_a_policy_that_returns_the_usual_method_compresses_as_usual():
    usual = plans_of(lambda name, p: False)
    assert contents(plans_of(lambda name, p: METHOD)) == contents(usual)


def test_a_policy_may_leave_a_parameter_to_a_plain_average_of_its_own():
    plans = plans_of(by_name({"0.*": UNCOMPRESSED}))
    assert [plan.method for plan in plans] == [None, METHOD, UNCOMPRESSED]
    (end,) = local_group(1)
    assert plans[-1].decide(end).exchange.name == "dense"


def test_names_of_tensorflow_need_no_zero_and_patterns_that_fit_nothing_are_named():
    policy = by_name({"net/w": OTHER, "b:0": "dense", "emmbed*": "dense"})
    assert [policy(f"{name}:0", np.zeros((60, 60))) for name in ("net/w", "b")] == [OTHER, True]
    named = [("net/w:0", np.zeros((60, 60), "f4")), ("b:0", np.zeros(3, "f4"))]
    with pytest.warns(
        UserWarning, match=r"'emmbed\*' in by_name, which fits none of 2 .*'net/w:0'"
    ):
        warn_of_surprises(named, METHOD, policy, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_surprises(named, METHOD, policy, 1)
        warn_of_surprises(named, METHOD, by_name({"net/*": OTHER}), 0)


def test_names_without_a_pattern_go_to_the_next_policy():
    policy = by_name({"head.*": OTHER}, otherwise=dense_below(41))
    assert [policy(*one) for one in NAMED] == [False, False, True, False, OTHER, OTHER]


def test_a_single_parameter_is_decided_in_the_same_way():
    for name, array in NAMED:
        plan = plan_one("x", (name, array), METHOD, dense=POLICY, dense_steps=2)
        (expected,) = (p for p in plans_of(POLICY) if name in [slot.name for slot in p.slots])
        assert plan.method == expected.method
        assert plan.length == math.prod(SHAPES[name])


def test_what_does_not_shrink_stays_dense():
    top = ef.EF21(ef.TopK(k=1000))
    policy = dense_unless_smaller(top, otherwise=dense_below(0))
    for d in (900, 1001, 1500, 3000):
        dense = top.compressor.nbytes(d) >= 4 * d
        assert policy("w", np.zeros(d)) is dense
    assert dense_unless_smaller(top)("b", np.zeros(3000)) is True  # by the default's shape rule
    power = dense_unless_smaller(ef.PowerSGD(rank=4), otherwise=dense_below(0))
    assert power("w", np.zeros((6, 6))) is True
    assert power("w", np.zeros((60, 60))) is False


@pytest.mark.parametrize("answer", ["dense", None, 1, ef.TopK(0.1), ef.EF21], ids=repr)
def test_another_answer_is_refused_by_name(answer):
    with pytest.raises(ef.UnsupportedError, match=r"dense= returned .* for 'embed.weight', expec"):
        plans_of(lambda name, p: answer)
    with pytest.raises(ef.UnsupportedError, match=r"dense= returned .* for 'embed.weight', expec"):
        require_answers(NAMED, lambda name, p: answer, METHOD)


def test_numpys_booleans_are_answers():
    policy = lambda name, p: np.prod(p.shape) < 41  # noqa: E731
    assert contents(plans_of(policy)) == contents(plans_of(dense_below(41)))


@pytest.mark.parametrize("answer", [True, "sparse", ["dense"], ef.TopK(0.1)], ids=repr)
def test_by_name_refuses_other_words(answer):
    with pytest.raises(ef.UnsupportedError, match=r"by_name got .* for 'x', expected 'dense', 'c"):
        by_name({"x": answer})


def test_momentum_is_in_all_methods_or_in_none():
    corrected = ef.MomentumCorrection(ef.TopK(0.1))
    for method, other in ((METHOD, corrected), (corrected, METHOD)):
        policy = by_name({"0.*": other})
        with pytest.raises(
            ef.UnsupportedError, match=r"'0.weight' .*, expected one with the same m"
        ):
            plans_of(policy, method)
    adam = ef.FrozenAdam(ef.TopK(0.1))
    for method, other in ((METHOD, adam), (adam, METHOD), (corrected, adam)):
        with pytest.raises(ef.UnsupportedError, match="expected one with the same momentum"):
            require_answers(NAMED, by_name({"0.*": other}), method)
    require_answers(NAMED, by_name({"0.*": ef.FrozenAdam(ef.OneBit())}), adam)
    same = ef.MomentumCorrection(ef.TopK(0.3))
    assert same in [plan.method for plan in plans_of(by_name({"0.*": same}), corrected)]
    alone, policy = for_one_rank(corrected, by_name({"0.*": same}))
    assert {plan.method for plan in plans_of(policy, alone)} == {alone}


class Driver(StepDriver):
    """Buckets in one process."""

    def __init__(self, dense, end, method=METHOD):
        class Bucket:
            def __init__(self, plan):
                self.slots = plan.slots
                self.channel = plan.open(np.zeros(plan.length, np.float32), end)

        super().__init__(method, end, [Bucket(plan) for plan in plans_of(dense, method)])


def test_each_bucket_is_that_of_a_job_with_its_method():
    drivers = [Driver(POLICY, end) for end in local_group(2)]
    alone = [Driver(lambda name, p: name.startswith("embed") or name == "head.bias", end, OTHER)
             for end in local_group(2)]  # fmt: skip
    d = drivers[0].buckets[-1].channel.gradient.shape[0]
    for t, g in enumerate(gradients(2, 5, d=d)):
        found = run_channels([one.buckets[-1].channel for one in drivers], g, t)
        expected = run_channels([one.buckets[-1].channel for one in alone], g, t)
        assert [one.tobytes() for one in found] == [one.tobytes() for one in expected]


def test_a_checkpoint_of_other_methods_is_refused():
    end, again = local_group(1)[0], local_group(1)[0]
    saved = Driver(POLICY, end).state_dict()
    others = ("head.weight", "1.weight", "0.bias", "0.weight")
    assert saved["methods"] == dict.fromkeys(others, repr(OTHER))
    Driver(POLICY, again).load_state_dict(saved)
    swapped = by_name({"embed.*": "dense", "head.bias": OTHER, "*": "compressed"})
    for policy in (lambda name, p: False, by_name({"*": ef.EF21(ef.TopK(0.5))}), swapped):
        with pytest.raises(ValueError, match=r"got a compression state of '.*' by .*, expec"):
            Driver(policy, local_group(1)[0]).load_state_dict(saved)


def test_a_checkpoint_of_one_method_names_no_other():
    saved = Driver(lambda name, p: False, local_group(1)[0]).state_dict()
    assert saved.pop("methods") == {}
    Driver(lambda name, p: False, local_group(1)[0]).load_state_dict(saved)  # of earlier versions


def test_the_config_that_ranks_compare_names_the_method_of_each_parameter():
    facts = describe(Driver(POLICY, local_group(1)[0]).buckets)
    (fact,) = (fact for fact in facts if "'1.weight'" in fact)
    assert fact.endswith(f"of shape (50, 40) in bucket.1 by {OTHER!r} (gather)")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: by_name([1]), r"by_name got \[1\], expected a dict"),
        (lambda: by_name({1: "dense"}), "by_name got .* expected a dict"),
        (lambda: by_name({}, otherwise=3), "by_name got otherwise=3, expected a fun"),
        (lambda: dense_unless_smaller(3), "got compression=3, expected a method"),
    ],
)
def test_what_is_no_policy_is_refused(make, sentence):
    with pytest.raises(ef.UnsupportedError, match=sentence):
        make()
