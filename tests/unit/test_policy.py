"""What a wrapped optimizer says of parameters that it treats as nobody would expect."""

from __future__ import annotations

import warnings

import numpy as np

import ef_horovod as ef
from ef_horovod.training.momentum import warn_of_adam
from ef_horovod.training.policy import small_or_vector, warn_of_surprises

METHOD = ef.EF21(ef.TopK(ratio=0.01))
MATRIX, ADAPTER = ("matrix", np.zeros((64, 64), np.float32)), ("lora", np.zeros((8, 64), "f4"))


def said(named, method=METHOD, dense=small_or_vector, rank=0):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_surprises(named, method, dense, rank)
    return [str(warning.message) for warning in caught]


def test_a_usual_model_is_passed_over_in_silence():
    assert said([MATRIX, ADAPTER]) == []
    assert said([]) == []


def test_parameters_of_which_none_is_compressed_are_named_once():
    (message,) = said([ADAPTER, ("bias", np.zeros(64, np.float32))])
    assert "keeps all 2 uncompressed, the largest of 512 elements" in message
    assert "pass dense=lambda name, parameter: False" in message
    assert said([ADAPTER], dense=lambda name, parameter: False) == []
    assert len(said([ADAPTER], method=ef.PowerSGD(rank=2))) == 1


def test_without_compression_there_is_nothing_to_miss():
    assert said([ADAPTER], method=ef.NoFeedback(ef.Identity())) == []


def test_float64_is_said_to_be_reduced_in_float32():
    double = ("double", np.zeros((64, 64)))
    (message,) = said([MATRIX, double], method=ef.NoFeedback(ef.Identity()))
    assert "float64 in 1 of 2 parameters (such as 'double')" in message
    assert "train in float32" in message


def test_one_rank_speaks_for_all():
    assert said([ADAPTER], rank=1) == []


class AdamW:
    """Named as an optimizer of any framework."""


class Mine(AdamW):
    """A user's own."""


def test_adam_beside_error_feedback_is_advised_once_on_rank_0(recwarn):
    uncompressed = [ef.NoFeedback(ef.Natural()), ef.NoFeedback(ef.Identity())]
    warn_of_adam(AdamW(), [*uncompressed, ef.ErrorFeedback(ef.Identity())], 0)
    warn_of_adam(AdamW(), [METHOD], 1)
    warn_of_adam(object(), [METHOD], 0)
    assert not recwarn.list
    warn_of_adam(Mine(), [*uncompressed, METHOD], 0)
    (warning,) = recwarn.list
    assert "got Mine with EF21(" in str(warning.message)
    assert "expected ef.CompressedUpdates or FrozenAdam" in str(warning.message)
