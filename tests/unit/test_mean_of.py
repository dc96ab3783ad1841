"""Means of messages: in one pass they are the same bits as one message after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ef_horovod as ef
import ef_horovod.arrays.torch as torch_arrays
from ef_horovod.arrays import namespace
from ef_horovod.compressors import registry
from ef_horovod.compressors.base import Payload, mean_at_once
from ef_horovod.errors import PayloadError
from ef_horovod.methods import base
from ef_horovod.methods.base import mean_of

COMPRESSORS = [example for cls in registry.COMPRESSORS.values() for example in cls.examples()]
AT_ONCE = [ef.OneBit(), ef.OneBit("l2"), ef.TopK(0.01), ef.HardThreshold(2.0)]
LENGTH = 10_003  # two blocks of the kernels and a part, no multiple of 8
rng = np.random.default_rng(0)


def messages_of(compressor, workers=3):
    x = rng.normal(size=(workers, LENGTH)).astype(np.float32)
    return [compressor.compress(row, ef.Key(rank=rank)) for rank, row in enumerate(x)]


def one_after_the_other(messages, workers, plus):
    total = np.zeros(LENGTH, np.float32)
    for message in messages:
        message.add_to(total)
    mean = total / np.float32(workers)
    return mean if plus is None else mean + plus


@pytest.fixture
def at_once(monkeypatch):
    """For each mean that is made from now on, whether it was made in one pass."""
    told, original = [], base.mean_at_once

    def tell(*args):
        told.append(original(*args))
        return told[-1]

    monkeypatch.setattr(base, "mean_at_once", tell)
    return told


@pytest.mark.parametrize("plus", [None, rng.normal(size=LENGTH).astype(np.float32)])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_all_frameworks_make_the_same_bits(compressor, plus):
    messages = messages_of(compressor)
    expected = one_after_the_other(messages, 3, plus)
    for kind in (np.array, torch.tensor):
        out = kind(np.full(LENGTH, 7, np.float32))
        found = mean_of(messages, 3, out, None if plus is None else kind(plus))
        assert found is out
        assert namespace(out).to_host(out).tobytes() == expected.tobytes()


@pytest.mark.parametrize("compressor", AT_ONCE, ids=repr)
def test_what_is_made_in_one_pass(compressor, at_once):
    mean_of(messages_of(compressor), 3, np.zeros(LENGTH, np.float32))
    # Together longer than the vector: decoded one by one, for the memory that it would take.
    many = messages_of(compressor) * 400
    out = np.zeros(LENGTH, np.float32)
    assert mean_of(many, 1200, out).tobytes() == one_after_the_other(many, 1200, None).tobytes()
    assert at_once == [True, False]


def test_messages_of_two_kinds_are_decoded_one_by_one(at_once):
    sparse, *_ = messages_of(ef.TopK(0.1))
    signs, *_ = messages_of(ef.OneBit())
    out = np.zeros(LENGTH, np.float32)
    expected = one_after_the_other([sparse, signs], 2, None)
    assert mean_of([sparse, signs], 2, out).tobytes() == expected.tobytes()
    assert at_once == [False]


def test_absent_workers_say_nothing(at_once):
    messages = messages_of(ef.TopK(0.1))
    expected = one_after_the_other(messages[:1], 3, None)
    absent = ef.TopK(0.1).absent(np.zeros(LENGTH, np.float32))
    out = np.full(LENGTH, 7, np.float32)
    assert mean_of([absent, messages[0], absent], 3, out).tobytes() == expected.tobytes()
    assert not np.any(mean_of([absent, absent], 2, out))
    assert at_once == [True, False]


@pytest.mark.parametrize("compressor", AT_ONCE, ids=repr)
def test_a_malformed_message_changes_nothing(compressor):
    good, bad, _ = messages_of(compressor)
    data = np.frombuffer(bytes(bad), np.uint8).copy()
    data[16:20] = 255  # a scale that is no number, a count that is too large
    out = np.full(LENGTH, 7, np.float32)
    with pytest.raises(PayloadError):
        mean_of([good, Payload(data)], 2, out)
    assert np.all(out == 7)


def test_a_message_of_another_length_or_to_be_skipped_is_refused():
    good, *_ = messages_of(ef.TopK(0.1))
    short = ef.TopK(0.1).compress(np.ones(LENGTH - 1, np.float32))
    out = np.zeros(LENGTH, np.float32)
    with pytest.raises(ValueError, match=f"expected float32.{LENGTH - 1}."):
        mean_of([good, short], 2, out)
    with pytest.raises(PayloadError, match="drop the step"):
        mean_of([good, good.as_skip()], 2, out)


def test_a_class_with_another_format_inherits_no_mean():
    x = np.ones(9, np.float32)
    blocks = ef.OneBit(block=8).compress(x)
    assert not mean_at_once([blocks], 1, x, None)

    class Backwards(ef.TopK):
        @classmethod
        def accumulate(cls, body, dense, weight):
            super().accumulate(body, dense, -weight)

    assert not Backwards.mean([np.zeros(0, np.uint8)], 1, None, x)


def test_what_is_not_on_the_host_is_left_to_its_framework():
    assert torch_arrays.host_view(torch.zeros(9, device="meta")) is None
    x = torch.zeros(9)
    torch_arrays.host_view(x)[3] = 1
    assert x[3] == 1
