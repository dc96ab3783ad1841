"""Which exchange is chosen, what arrives by it, and how one rank drops a step for all."""

from __future__ import annotations

import numpy as np
import pytest

import ef_horovod as ef
from ef_horovod import wire
from ef_horovod.exchange.registry import EXCHANGES
from ef_horovod.training.choice import choose
from ef_horovod.transports.local import local_group

X = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)


def meet(kind, payloads, *, fixed_size=True):
    """What each rank receives."""
    group = local_group(len(payloads), timeout=1)
    waits = [
        EXCHANGES[kind].send(endpoint, "x", payload, fixed_size=fixed_size)
        for endpoint, payload in zip(group, payloads, strict=True)
    ]
    return [wait() for wait in waits], group


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (ef.NoFeedback(ef.Identity()), "dense"),
        (ef.ErrorFeedback(ef.Identity()), "reduce"),
        (ef.EF21(ef.RandomK(0.1)), "reduce"),
        (ef.EF21(ef.RandomK(0.1, shared=False)), "gather"),
        (ef.NoFeedback(ef.RandomK(0.1, scale="unbiased")), "reduce"),
        (ef.EF21(ef.TopK(k=3)), "gather"),
        (ef.ErrorFeedback(ef.OneBit()), "gather"),
        (ef.NoFeedback(ef.Cast("float16")), "gather"),
    ],
    ids=repr,
)
def test_auto_takes_the_cheapest_that_can_work(method, expected):
    assert choose("auto", method).name == expected
    assert choose(expected, method).name == expected
    assert choose("gather", method).name == "gather"


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("reduce", ef.EF21(ef.TopK(k=3)), "expected a linear compressor"),
        ("dense", ef.ErrorFeedback(ef.Identity()), "expected NoFeedback"),
        ("dense", ef.EF21(ef.TopK(k=3)), "expected NoFeedback"),
    ],
)
def test_impossible_exchanges_are_refused(kind, method, message):
    with pytest.raises(ef.UnsupportedError, match=message):
        choose(kind, method)


def test_unknown_exchange_is_refused():
    with pytest.raises(ValueError, match="got exchange='ring', expected one of"):
        choose("ring", ef.EF21(ef.TopK(k=3)))


def test_gather_brings_every_payload_in_rank_order():
    payloads = [ef.TopK(k=4).compress(x) for x in X]
    received, group = meet("gather", payloads)
    for messages in received:
        assert [bytes(m) for m in messages] == [bytes(p) for p in payloads]
    assert [endpoint.bytes_sent for endpoint in group] == [2 * payloads[0].nbytes] * 3


VARYING = [ef.RandomSparsify(0.3), ef.Then(ef.RandomSparsify(0.3), ef.Identity())]


@pytest.mark.parametrize("compressor", VARYING, ids=repr)
@pytest.mark.parametrize("skipping", [None, 0, 2])
def test_sums_of_lengths_that_follow_from_the_key_alone(compressor, skipping):
    """Also where a rank asks to drop the step, and where nothing at all is kept."""
    entries = set()
    for step in range(20):
        few = type(compressor) is ef.RandomSparsify and step < 10
        own = ef.RandomSparsify(0.01) if few else compressor
        keys = [ef.Key(step=step, rank=i) for i in range(3)]
        payloads = [own.compress(x, key) for x, key in zip(X, keys, strict=True)]
        entries.add(payloads[0].summands().size)
        if skipping is not None:
            payloads[skipping] = own.skip(X[skipping], keys[skipping])
        received, group = meet("reduce", payloads, fixed_size=False)
        if skipping is not None:
            assert all(messages[0].is_skip for messages in received)
            continue
        expected = sum(payload.decompress().astype(np.float64) for payload in payloads)
        for (message,) in received:
            np.testing.assert_allclose(message.decompress(), expected, atol=1e-5)
        padded = wire.size_class(max(payloads[0].summands().nbytes, 1))
        assert group[0].bytes_sent == 2 * 2 * padded // 3
    assert len(entries) > 3
    assert 0 in entries or type(compressor) is ef.Then


@pytest.mark.parametrize("compressor", [ef.Identity(), ef.RandomK(0.3)], ids=repr)
def test_reduce_brings_one_payload_that_stands_for_the_sum(compressor):
    payloads = [compressor.compress(x, ef.Key(rank=i)) for i, x in enumerate(X)]
    before = [bytes(payload) for payload in payloads]
    received, group = meet("reduce", payloads)
    expected = sum(payload.decompress().astype(np.float64) for payload in payloads)
    for messages in received:
        (message,) = messages
        assert bytes(message) == bytes(received[0][0])
        np.testing.assert_allclose(message.decompress(), expected, atol=1e-5)
    assert [bytes(payload) for payload in payloads] == before  # also kept as pending by EF21
    assert group[0].bytes_sent == 2 * 2 * payloads[0].summands().nbytes // 3


@pytest.mark.parametrize(
    ("kind", "compressor"),
    [("gather", ef.TopK(k=4)), ("gather", ef.Identity()), ("reduce", ef.Identity()),
     ("reduce", ef.RandomK(0.3))],
)  # fmt: skip
@pytest.mark.parametrize("who", [0, 1, 2])
def test_one_skip_reaches_all(kind, compressor, who):
    payloads = [compressor.compress(x) for x in X]
    payloads[who] = compressor.skip(X[who])
    received, _ = meet(kind, payloads)
    for messages in received:
        assert any(message.is_skip for message in messages)
    with pytest.raises(ef.PayloadError, match="asks to drop the step"):
        payloads[who].decompress()


def test_a_sum_that_overflows_drops_the_step():
    huge = np.full(5, 3e38, np.float32)
    received, _ = meet("reduce", [ef.Identity().compress(huge)] * 2)
    assert [[message.is_skip for message in messages] for messages in received] == [[True]] * 2


def test_a_rank_with_another_config_or_model_is_named():
    own = ef.TopK(k=4).compress(X[0])
    for other in (ef.OneBit().compress(X[1]), ef.TopK(k=4).compress(X[1, :39])):
        with pytest.raises(ef.PayloadError, match="rank 1 sent .* in 'x', expected one like"):
            meet("gather", [own, other])
