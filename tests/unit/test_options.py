"""Options are checked where they are given: wrong types and numbers out of range, in one form."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

import ef_horovod as ef
from ef_horovod.compressors.registry import COMPRESSORS
from ef_horovod.methods.parsing import read_method, write_method
from ef_horovod.methods.registry import METHODS

NUMBERS = ("int", "float", "Scheduled")


def _instances():
    """One of each registered class and of the other dataclasses with numbers."""
    compressors = [kind.examples()[0] for kind in COMPRESSORS.values()]
    compressors += [ef.TopK(k=3), ef.TernGrad(clip=2.5, bucket=512)]
    methods = [
        example
        for kind in METHODS.values()
        for example in kind.examples(ef.Identity())
        if kind.__module__.startswith("ef_horovod.")
    ]
    others = [ef.STORM(0.5), ef.ROOTSGD(), ef.IGT(), ef.PAGE(0.5), ef.Decay(power=1)]
    others += [ef.Exponential(1.0, 2.0, steps=8), ef.Linear(1.0, 2.0, steps=8)]
    others += [ef.cost.Network(1e9)]
    return [one for one in (*compressors, *methods, *others) if dataclasses.is_dataclass(one)]


def _numeric_fields():
    """(instance, field) of all that take a number, each once a class."""
    found = {}
    for one in _instances():
        for field in dataclasses.fields(one):
            kinds = {kind.strip() for kind in str(field.type).split("|")}
            if kinds.intersection(NUMBERS):
                found[f"{type(one).__name__}.{field.name}"] = (one, field)
    return found


FIELDS = _numeric_fields()
NO_NUMBERS = (True, "0.01", "auto", math.nan, [1], np.array([1, 2]), 1j, b"1", object())


def _with(instance, field, value):
    """The instance, with another value in the field; without the option that it excludes."""
    changes = {field.name: value}
    if field.name == "steps":
        changes["stages"] = 1
    if isinstance(instance, ef.TopK):
        changes = {"ratio": None, "k": None, **changes}
    return dataclasses.replace(instance, **changes)


def test_all_numeric_options_are_found():
    expected = {
        "TopK.ratio", "TopK.k", "QSGD.levels", "QSGD.bucket", "OneBitBlocks.block",
        "TruncateMantissa.bits",
        "TernGrad.clip", "TernGrad.bucket", "RandomSparsify.p", "HardThreshold.threshold",
        "NaturalDithering.norm", "EF21.momentum", "EF21.participation", "PowerSGD.rank",
        "ErrorFeedback.step_inside", "ErrorCompensatedX.alpha", "ErrorCompensatedX.beta",
        "PerturbedCompressedSGD.noise", "PerturbedCompressedSGD.reset_every", "PAGE.probability",
        "PAGE.seed", "STORM.alpha", "Decay.power", "Decay.initial", "Decay.offset",
        "Exponential.start", "Exponential.end", "Exponential.steps", "Exponential.stages",
        "Linear.start", "Linear.end", "Linear.steps", "Linear.stages",
        "Network.bandwidth", "Network.latency", "Network.burst",
    }  # fmt: skip
    assert expected <= set(FIELDS)


@pytest.mark.parametrize("where", FIELDS)
def test_no_option_takes_for_a_number_what_is_none(where):
    instance, field = FIELDS[where]
    for value in NO_NUMBERS:
        with pytest.raises(ValueError, match=rf"{field.name}=.*, expected .*; "):
            _with(instance, field, value)


@pytest.mark.parametrize("where", [key for key, (_, f) in FIELDS.items() if "int" in str(f.type)])
def test_no_whole_number_has_a_fraction(where):
    instance, field = FIELDS[where]
    for value in (2.5, 2.0, np.float64(2)):
        with pytest.raises(ValueError, match=rf"got {field.name}=.*, expected a whole number"):
            _with(instance, field, value)


@pytest.mark.parametrize("where", FIELDS)
def test_numpy_numbers_become_plain_ones(where):
    instance, field = FIELDS[where]
    value = getattr(instance, field.name)
    if isinstance(value, (ef.Decay, type(None))):
        value = 1
    given = _with(instance, field, np.asarray(value)[()])
    assert type(getattr(given, field.name)) in (int, float)
    assert given == _with(instance, field, value)
    assert repr(given) == repr(_with(instance, field, value))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ef.RandomK(0.1, shared="no"),
        lambda: ef.RandomK(0.1, scale=None),
        lambda: ef.RandomBlock(0.1, block=None),
        lambda: ef.Cast(16),
        lambda: ef.OneBit(scale=["l1"]),
        lambda: ef.TruncateMantissa(-1),
        lambda: ef.TruncateMantissa(23),
        lambda: ef.EF21(ef.TopK(0.1), weights="12"),
        lambda: ef.EF21(ef.TopK(0.1), weights=3),
        lambda: ef.EF21(ef.TopK(0.1), weights=(1.0, True)),
        lambda: ef.EF21(ef.TopK(0.1), weights=(1.0, math.inf)),
        lambda: ef.PowerSGD(shapes=(3, 4)),
        lambda: ef.PowerSGD(shapes=((3, 4.5),)),
        lambda: ef.ErrorFeedback(ef.OneBit(), step_inside=math.inf),
        lambda: ef.Decay(math.inf),
        lambda: ef.cost.Network(0),
        lambda: ef.cost.Network(math.inf),
        lambda: ef.cost.Network(1e9, latency=-1e-6),
        lambda: ef.cost.Network(1e9, burst=-1),
    ],
)
def test_other_options_are_refused_in_the_same_form(make):
    with pytest.raises(ValueError, match=r"^\w+ got \w+(\[\d\])?=.*, expected .*; .*"):
        make()


def test_a_method_of_numpy_numbers_is_read_back_from_its_text():
    method = ef.EF21(ef.TopK(k=np.int64(7)), momentum=np.float32(0.5), weights=np.array([1, 2]))
    assert write_method(method) == "EF21(TopK(k=7), momentum=0.5, weights=(1.0, 2.0))"
    assert read_method(write_method(method)) == method
