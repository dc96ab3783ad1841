"""Bytes per worker: held against what the transport counts, and where compression stops to pay."""

from __future__ import annotations

import math

import numpy as np
import pytest

import ef_horovod as ef
from ef_horovod import cost

ALL = [c for cls in (ef.Identity, ef.TopK, ef.RandomK, ef.OneBit) for c in cls.examples()]


def sent_by_simulate(compressor, d, n, exchange):
    run = ef.simulate(
        ef.NoFeedback(compressor),
        lambda i, x, t: np.ones(d),
        np.zeros(d),
        workers=n,
        steps=1,
        step_size=0.0,
        exchange=exchange,
    )
    return run.bytes_sent


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_gather_and_reduce_are_what_a_transport_counts(compressor, n):
    d = 300
    assert cost.traffic(compressor, d, n, "gather").sent == sent_by_simulate(
        compressor, d, n, "gather"
    )
    if compressor.allreducible:  # a transport counts whole bytes
        reduced = cost.traffic(compressor, d, n, "reduce").sent
        assert int(reduced) == sent_by_simulate(compressor, d, n, "reduce")
    else:
        message = "got exchange='reduce' with .*, expected a linear compressor"
        with pytest.raises(ValueError, match=message):
            cost.traffic(compressor, d, n, "reduce")


def test_dense_is_a_ring_over_float32():
    assert cost.dense_traffic(1000, 4).sent == 6000
    assert cost.traffic(ef.OneBit(), 1000, 4, "dense") == cost.dense_traffic(1000, 4)
    assert cost.traffic(ef.Identity(), 1000, 4, "reduce") == cost.dense_traffic(1000, 4)


def test_a_server_moves_all_messages_through_one_node():
    size = ef.OneBit().nbytes(1000)
    assert cost.traffic(ef.OneBit(), 1000, 8, "server") == (size, size, 8 * size)
    assert cost.server_traffic(10, 4000, 8).busiest == 32000


def test_the_double_pass_does_not_grow_with_the_workers():
    d, c = 10**6, ef.OneBit()
    passes = [cost.traffic(c, d, n, "double_pass").sent for n in (2, 8, 64)]
    gathers = [cost.traffic(c, d, n, "gather").sent for n in (2, 8, 64)]
    assert passes[-1] < 2 * passes[0]
    assert gathers[-1] == 63 * gathers[0]
    slice_nbytes = c.nbytes(-(-d // 8))
    assert passes[1] == 7 * 2 * slice_nbytes


def test_one_bit_pays_below_64_workers():
    d, c = 10**7, ef.OneBit()
    limit = cost.break_even_ranks(c, d)
    assert 63.9 < limit < 64
    for n in (2, 63, 64, 100):
        pays = cost.traffic(c, d, n, "gather").sent < cost.dense_traffic(d, n).sent
        assert pays == (n < limit)
    assert cost.break_even_ranks(ef.TopK(ratio=0.01), 10**7) == pytest.approx(157.8, abs=0.1)


class EightBytes:
    """A stand-in for k pairs of float32 and int32 without a header."""

    fixed_size = True

    def __init__(self, k):
        self.k = k

    def nbytes(self, d):
        return 8 * self.k


@pytest.mark.parametrize("n", [2, 5, 16])
def test_break_even_density(n):
    d = 100_000
    plain = cost.break_even_density(d, n, EightBytes)
    assert 1 / n - 2 / d < plain < 1 / n
    coded = cost.break_even_density(d, n)
    assert plain < coded < 2 / n
    k = round(coded * d)
    assert cost.traffic(ef.TopK(k=k), d, n, "gather").sent < cost.dense_traffic(d, n).sent
    if k < d:
        more = cost.traffic(ef.TopK(k=k + 1), d, n, "gather").sent
        assert more >= cost.dense_traffic(d, n).sent


def test_small_entries_pay_at_any_density():
    assert cost.break_even_density(1000, 2, lambda k: EightBytes(k / 4)) == 1.0


def test_a_header_alone_can_be_too_much():
    assert cost.break_even_density(2, 16) == 0.0


class AnyNumber(EightBytes):
    """A stand-in for a hard threshold: how many entries there are is not known in advance."""

    fixed_size = False


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cost.gather_traffic(10, 0), "got n=0"),
        (lambda: cost.gather_traffic(10, 2.5), "got n=2.5, expected a whole number of at least 1"),
        (lambda: cost.dense_traffic(10, True), "got n=True, expected a whole number"),
        (lambda: cost.server_traffic(10, -1, 2), "got down_nbytes=-1, expected a number in"),
        (lambda: cost.reduce_traffic(math.nan, 2), "got summed_nbytes=nan, expected a number in"),
        (lambda: cost.dense_traffic(-1, 2), "got d=-1, expected a whole number of at least 0"),
        (lambda: cost.traffic(ef.TopK(0.1), 1e6, 2, "gather"), "got d=1000000.0, .* 10\\*\\*6"),
        (lambda: cost.traffic(ef.OneBit(), 10, math.nan, "gather"), "got n=nan, expected a whole"),
        (lambda: cost.traffic(ef.OneBit(), 10, 2, ["gather"]), r"exchange=\['gather'\], expected"),
        (
            lambda: cost.traffic(ef.OneBit(), 10, 2, "auto"),
            r"got exchange='auto', expected one of \('gather', .*'server'.*\); name one .*'auto'",
        ),
        (lambda: cost.traffic(ef.OneBit(), 10, 2, "carrier pigeon"), "expected one of"),
        (lambda: cost.break_even_ranks(ef.OneBit(), 0), "got d=0"),
        (lambda: cost.break_even_density(10, 1), "got n=1, expected a whole number of at least 2"),
        (
            lambda: cost.traffic(ef.HardThreshold(0.1), 10, 2, "gather"),
            "whose payload size follows from d",
        ),
        (lambda: cost.break_even_ranks(AnyNumber(1), 10), "whose payload size follows from d"),
        (lambda: cost.break_even_density(10, 2, AnyNumber), "whose payload size follows from d"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
