"""Numbers that follow from the step."""

from __future__ import annotations

import pytest

import ef_horovod as ef
from ef_horovod.methods.schedules import value_at


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
    with pytest.raises(ValueError, match=r"got alpha=.*, expected a weight in \(0, 1\] or a Decay"):
        ef.STORM(bad)
