"""Means of messages: part by part they are the same bits as one message after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ef_horovod as ef
import ef_horovod.arrays.numpy as host
import ef_horovod.arrays.torch as torch_arrays
from ef_horovod import registry
from ef_horovod.arrays import namespace
from ef_horovod.compressors.base import Payload
from ef_horovod.errors import PayloadError
from ef_horovod.methods import base
from ef_horovod.methods.base import mean_of

COMPRESSORS = [example for cls in registry.COMPRESSORS.values() for example in cls.examples()]
READERS = [ef.OneBit(), ef.OneBit("l2"), ef.TopK(0.01), ef.HardThreshold(2.0)]
LENGTH = 1003  # not a multiple of anything
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr(base, "_PART", 64)


def messages_of(compressor, workers=3):
    x = rng.normal(size=(workers, LENGTH)).astype(np.float32)
    return [compressor.compress(row, ef.Key(rank=rank)) for rank, row in enumerate(x)]


def one_after_the_other(messages, workers, plus):
    total = np.zeros(LENGTH, np.float32)
    for message in messages:
        message.add_to(total)
    mean = total / np.float32(workers)
    return mean if plus is None else mean + plus


def by_parts(monkeypatch):
    """Called as often as means are made by parts from now on."""
    called, original = [], base._mean_by_parts
    monkeypatch.setattr(base, "_mean_by_parts", lambda *args: called.append(1) or original(*args))
    return called


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


@pytest.mark.parametrize("compressor", READERS, ids=repr)
def test_what_has_a_reader_goes_by_parts(compressor, monkeypatch):
    called = by_parts(monkeypatch)
    mean_of(messages_of(compressor), 3, np.zeros(LENGTH, np.float32))
    assert called
    # Together longer than the vector: decoded one by one, for the memory that it would take.
    many = messages_of(compressor) * 400
    out = np.zeros(LENGTH, np.float32)
    assert mean_of(many, 1200, out).tobytes() == one_after_the_other(many, 1200, None).tobytes()
    assert len(called) == 1


def test_absent_workers_say_nothing(monkeypatch):
    called, messages = by_parts(monkeypatch), messages_of(ef.TopK(0.1))
    expected = one_after_the_other(messages[:1], 3, None)
    absent = ef.TopK(0.1).absent(np.zeros(LENGTH, np.float32))
    out = np.zeros(LENGTH, np.float32)
    assert mean_of([absent, messages[0], absent], 3, out).tobytes() == expected.tobytes()
    assert called


@pytest.mark.parametrize("compressor", READERS, ids=repr)
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


def test_a_class_with_another_format_has_no_inherited_reader():
    assert (
        ef.OneBit(block=8).compress(np.ones(9, np.float32)).reader(np.zeros(9, np.float32)) is None
    )

    class Backwards(ef.TopK):
        @classmethod
        def accumulate(cls, body, dense, weight):
            super().accumulate(body, dense, -weight)

    assert Backwards.reader(np.zeros(0, np.uint8), 0) is None


def test_what_works_on_parts_of_host_memory():
    y = rng.normal(size=10_001).astype(np.float32)
    indices = np.sort(rng.choice(10_001, 500, replace=False))
    values, x = 3 * y[:500], y.copy()
    parts = host.host_parts(x, 3000)
    assert [part.size for part in parts] == [3000, 3000, 3000, 1001]
    assert [part.size for part in torch_arrays.host_parts(torch.from_numpy(x), 9000)] == [
        9000,
        1001,
    ]
    assert torch_arrays.host_parts(torch.zeros(9, device="meta"), 3) == []
    for number, part in enumerate(parts):
        host.scatter_add_part(part, 3000 * number, indices, values, -0.5)
    whole = y.copy()
    host.scatter_add(whole, indices, values, -0.5)
    assert x.tobytes() == whole.tobytes()
    out = np.empty_like(y)
    host.divide_add(x, 3, y, out)
    assert out.tobytes() == (x / np.float32(3) + y).tobytes()
