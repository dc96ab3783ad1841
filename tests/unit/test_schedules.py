"""Numbers that follow from the step."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest

import ef_horovod as ef
from ef_horovod.methods.parsing import read_compressor, read_method
from ef_horovod.methods.schedules import value_at
from ef_horovod.testing.tools import array_of


def test_a_decay_falls_as_it_says():
    decay = ef.Decay(power=0.5, initial=3.0, offset=5.0)
    assert decay.at(0) == 3.0
    assert decay.at(15) == pytest.approx(1.5)
    assert ef.Decay(power=0, initial=0.2).at(10**9) == 0.2
    assert [ef.Decay(power=1, offset=2).at(2 * t) for t in range(3)] == [1, 1 / 2, 1 / 3]


def test_numbers_are_schedules_too():
    assert value_at(0.25, 7) == 0.25
    assert value_at(1, 7) == 1.0
    assert value_at(ef.Decay(power=1), 3) == 0.25


@pytest.mark.parametrize("options", [{"power": -1}, {"initial": 0}, {"offset": 0}], ids=repr)
def test_a_decay_that_rises_or_has_no_start_is_refused(options):
    with pytest.raises(ValueError, match=r"Decay got .*, expected a number in .0, inf\)"):
        ef.Decay(**{"power": 1, **options})


@pytest.mark.parametrize("bad", [0, 1.5, -0.1, float("nan"), ef.Decay(1, initial=1.5)], ids=repr)
def test_a_weight_stays_in_the_unit_interval(bad):
    assert ef.STORM(ef.Decay(1)).alpha == ef.Decay(1)
    assert ef.STORM(1).alpha == 1
    with pytest.raises(ValueError, match=r"got alpha=.*, expected a weight in \(0, 1\], or a s"):
        ef.STORM(bad)


def test_an_exponential_way_is_the_warm_up_of_dgc():
    warm_up = ef.Exponential(0.25, 0.001, steps=400)
    assert [warm_up.at(t) for t in range(400)] == [
        pytest.approx(0.25 * 0.004 ** (t // 100 / 4)) for t in range(400)
    ]
    assert warm_up.at(400) == warm_up.at(10**9) == warm_up.final == 0.001
    assert warm_up.bounds == (0.001, 0.25)
    each = ef.Exponential(1.0, 0.01, steps=10, stages=10)
    assert len({each.at(t) for t in range(11)}) == 11
    assert each.at(5) == pytest.approx(0.1)


def test_a_linear_way_may_rise():
    rise = ef.Linear(0.1, 0.5, steps=4)
    assert [rise.at(t) for t in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    assert ef.Linear(3, 1, steps=3, stages=1).at(2) == 3


def test_pieces_hold_from_their_step_on():
    pieces = ef.Piecewise({1000: 0.01, 0: 0.1})
    assert [pieces.at(t) for t in (0, 999, 1000, 10**9)] == [0.1, 0.1, 0.01, 0.01]
    assert repr(pieces) == "Piecewise({0: 0.1, 1000: 0.01})"
    assert pieces == ef.Piecewise({0: 0.1, 1000: 0.01})
    assert len({pieces, ef.Piecewise({0: 0.1, 1000: 0.01})}) == 1


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ef.Exponential(0, 1, 10), "Exponential got start=0, expected a number in"),
        (lambda: ef.Linear(1, 1, 0), "Linear got steps=0, expected a whole number of at least 1"),
        (lambda: ef.Linear(1, 1, 3), "Linear got stages=4, expected a whole number from 1 to 3"),
        (lambda: ef.Piecewise({5: 1}), "Piecewise got {5: 1}, expected a value from step 0 on"),
        (lambda: ef.Piecewise({}), "Piecewise got {}, expected a value"),
        (lambda: ef.Piecewise(0.1), "Piecewise got 0.1, expected a value"),
        (lambda: ef.Piecewise({0: "a"}), "Piecewise got value='a', expected a number"),
        (lambda: ef.Piecewise({0.5: 1}), "Piecewise got step=0.5, expected a whole number"),
    ],
)
def test_schedules_that_mean_nothing_are_refused(make, sentence):
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        make()


WARM_UP = ef.Exponential(0.25, 0.01, steps=8)
CHANGING = {
    ef.TopK(ratio=WARM_UP): ef.TopK(ratio=0.01),
    ef.TopK(k=ef.Linear(40, 10, steps=8)): ef.TopK(k=10),
    ef.RandomK(WARM_UP): ef.RandomK(0.01),
    ef.RandomK(WARM_UP, shared=False): ef.RandomK(0.01, shared=False),
    ef.RandomBlock(WARM_UP, block=5): ef.RandomBlock(0.01, block=5),
    ef.RandomSparsify(WARM_UP): ef.RandomSparsify(0.01),
    ef.HardThreshold(ef.Exponential(0.1, 2, steps=8)): ef.HardThreshold(2),
    ef.QSGD(ef.Linear(7, 63, steps=8), bucket=9): ef.QSGD(63, bucket=9),
    ef.NaturalDithering(ef.Linear(4, 8, steps=8)): ef.NaturalDithering(8),
    ef.TruncateMantissa(ef.Linear(7, 1, steps=8)): ef.TruncateMantissa(1),
    ef.Then(ef.TopK(WARM_UP), ef.Natural()): ef.Then(ef.TopK(0.01), ef.Natural()),
    ef.Scaled(ef.QSGD(ef.Piecewise({0: 3, 6: 15}))): ef.Scaled(ef.QSGD(15)),
}


@pytest.mark.parametrize("changing", CHANGING, ids=repr)
def test_a_compressor_of_each_step_makes_its_bytes(changing):
    """In all frameworks, with the sizes that it claims; at the end, those of the final numbers."""
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    for t in range(10):
        key, fixed = ef.Key(seed=3, step=t), changing.at(t)
        assert not fixed.changes
        assert fixed.at(t + 1) is fixed
        expected = bytes(fixed.compress(x, key))
        for framework in ("numpy", "torch", "tensorflow"):
            assert bytes(changing.compress(array_of(framework, x), key)) == expected
        payload, lost = changing.compress_with_residual(x.copy(), key)
        assert bytes(payload) == expected
        np.testing.assert_array_equal(lost, x - payload.decompress())
        if changing.fixed_size:
            assert len(expected) == fixed.nbytes(1000) == changing.skip(x, key).nbytes
    final = CHANGING[changing]
    assert changing.at(8) == final
    assert changing.at(0) != final
    assert changing != final
    assert changing.nbytes(1000) == final.nbytes(1000)
    assert changing.contraction(1000) == final.contraction(1000)
    assert changing.variance(1000) == final.variance(1000)


@pytest.mark.parametrize("changing", CHANGING, ids=repr)
def test_the_text_of_a_compressor_has_its_schedules(changing):
    again = read_compressor(repr(changing))
    assert again == changing
    assert hash(again) == hash(changing)
    assert "Exponential" in repr(changing) or "Linear" in repr(changing) or "Pie" in repr(changing)
    assert pickle.loads(pickle.dumps(changing)) == changing


def test_short_forms_take_schedules():
    assert read_compressor("topk:Exponential(0.25, 0.001, 2000)") == ef.TopK(
        ef.Exponential(0.25, 0.001, 2000)
    )
    assert read_compressor("topk:piecewise({0: 0.1, 9: 0.01})") == ef.TopK(
        ef.Piecewise({0: 0.1, 9: 0.01})
    )
    method = ef.EF21(ef.TopK(ratio=ef.Piecewise({0: 0.1, 9: 0.01})), momentum=0.1)
    assert read_method(repr(method)) == method


@pytest.mark.parametrize(
    "bad", [ef.Linear(0.5, 1.5, steps=9), ef.Decay(1), ef.Piecewise({0: 0.1, 1: 2})], ids=repr
)
def test_all_values_of_a_setting_are_in_its_range(bad):
    with pytest.raises(ValueError, match=r"TopK got ratio=.*expected a kept .*, or a schedule of"):
        ef.TopK(ratio=bad)


def test_the_weakest_compressor_of_a_schedule_must_suit_the_method():
    weak = ef.QSGD(ef.Linear(1, 100, steps=8), bucket=512)
    with pytest.raises(ValueError, match=r"ErrorFeedback got QSGD\(levels=1\), whose error"):
        ef.ErrorFeedback(weak)
    with pytest.raises(ValueError, match=r"EF21 got QSGD\(levels=1\), expected a contraction"):
        ef.EF21(weak)
    ef.ErrorFeedback(ef.Scaled(weak))


def test_numbers_without_a_schedule_refuse_one():
    with pytest.raises(ValueError, match=r"PowerSGD got rank=Linear\(.*, expected a whole number"):
        ef.PowerSGD(rank=ef.Linear(8, 2, steps=10))
    with pytest.raises(ValueError, match=r"EF21 got momentum=Linear\("):
        ef.EF21(ef.TopK(0.1), momentum=ef.Linear(0.5, 0.1, steps=10))
