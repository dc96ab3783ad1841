"""RandomSparsify: independent coins, drawn by their gaps, the same ones on both sides."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ef_horovod as ef
from ef_horovod.arrays import keys
from ef_horovod.compressors import randomsparsify
from ef_horovod.compressors.randomsparsify import _draw_indices, _gaps

GOLDEN_RATIO = 0x9E3779B97F4A7C15


def by_definition(seed, p, d):
    """The same places in big integers: gap g where (1 - p)^(g + 1) <= u < (1 - p)^g."""
    tails, _ = _gaps(p)
    falling = tails.tolist()
    places, index, j = [], -1, 0
    while True:
        j += 1
        word = keys._mix((seed + j * GOLDEN_RATIO) % 2**64)
        gap = sum(word < tail for tail in falling)
        index += gap + (gap < len(falling))
        if index >= d:
            return places
        if gap < len(falling):
            places.append(index)


@pytest.mark.parametrize("p", [1.0, 0.75, 0.5, 0.1, 0.01, 1e-4])
@pytest.mark.parametrize("seed", [0, 2**64 - 1, 12345])
def test_places_are_those_of_the_definition(p, seed):
    d = 3000 if p > 0.01 else 20_000
    assert _draw_indices(seed, p, d, d).tolist() == by_definition(seed, p, d)


@given(st.floats(0, 1, exclude_min=True))
@settings(max_examples=50)
def test_gaps_have_the_probabilities_of_the_definition(p):
    tails, guide = _gaps(p)
    for j in (0, 1, 7, 1023):
        exact = (1 - Fraction(p)) ** (j + 1) * 2**64
        assert abs(int(tails[j]) - exact) < 3 + (j + 1) / 2**32
    assert np.all(tails[:-1] >= tails[1:])
    for b in (0, 1, 511, 1023):
        last = ((b + 1) << 54) - 1
        assert guide[b] == np.count_nonzero(tails > np.uint64(last))


def test_counts_are_binomial_and_coins_independent():
    p, d, draws = 0.2, 500, 4000
    kept = np.zeros((draws, d))
    for t in range(draws):
        kept[t, _draw_indices(ef.Key(step=t).draw(shared=True), p, d, d)] = 1
    counts = kept.sum(1)
    deviation = math.sqrt(p * (1 - p) * d)
    assert counts.mean() == pytest.approx(p * d, abs=5 * deviation / math.sqrt(draws))
    assert counts.std() == pytest.approx(deviation, rel=0.06)
    limit = 5 * math.sqrt(p * (1 - p) / draws)
    assert np.abs(kept.mean(0) - p).max() < limit
    for shift in (1, 2, 250):
        both = (kept[:, shift:] * kept[:, :-shift]).mean(0)
        assert np.abs(both - p * p).max() < limit


@pytest.mark.parametrize(("p", "d"), [(1.0, 50), (0.5, 0), (1e-300, 10**6), (5e-324, 1000)])
def test_ends_of_the_range(p, d):
    kept = _draw_indices(3, p, d, d)
    assert kept.size == (d if p == 1 else 0)
    x = np.ones(d, np.float32)
    assert np.array_equal(ef.RandomSparsify(p).compress(x).decompress(), x if p == 1 else 0 * x)


def test_more_entries_than_there_was_room_for(monkeypatch):
    expected = _draw_indices(9, 0.3, 10_000, 10_000)
    monkeypatch.setattr(randomsparsify.math, "sqrt", lambda _: -400.0)  # a sixth below the mean
    assert np.array_equal(_draw_indices(9, 0.3, 10_000, 10_000), expected)


def test_shared_coins_are_equal_on_all_ranks_and_others_differ():
    x, y = np.random.default_rng(0).normal(size=(2, 1000)).astype(np.float32)
    for shared in (True, False):
        compressor = ef.RandomSparsify(0.2, shared=shared)
        a = compressor.compress(x, ef.Key(step=4, rank=0)).decompress() != 0
        b = compressor.compress(y, ef.Key(step=4, rank=1)).decompress() != 0
        assert np.array_equal(a, b) == shared == compressor.allreducible
        c = compressor.compress(x, ef.Key(step=5, rank=0)).decompress() != 0
        assert not np.array_equal(a, c)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_constants_on_average_are_equalities(p):
    x = np.random.default_rng(1).normal(size=200) ** 3
    x = x.astype(np.float32)
    square = float(np.sum(x.astype(float) ** 2))
    exact = {"contractive": 1 - p, "unbiased": 1 / p - 1}
    for scale, expected in exact.items():
        compressor = ef.RandomSparsify(p, scale=scale)
        decoded = np.array(
            [compressor.compress(x, ef.Key(step=t)).decompress() for t in range(4000)], float
        )
        losses = ((decoded - x) ** 2).sum(1) / square
        assert losses.mean() == pytest.approx(expected, abs=5 * losses.std() / math.sqrt(4000))
        claimed = compressor.variance(200) if scale == "unbiased" else 1 - compressor.contraction(7)
        assert claimed == pytest.approx(expected)
        if scale == "unbiased":
            spread = np.abs(x) * math.sqrt((1 / p - 1) / 4000)
            assert np.all(np.abs(decoded.mean(0) - x) <= 5 * spread)


def test_size_is_the_seed_and_the_values():
    """Section 3.2 of DoubleSqueeze counts an index for each entry; a seed replaces them."""
    d, p = 100_000, 0.01
    sizes = [ef.RandomSparsify(p).compress(np.ones(d), ef.Key(step=t)).nbytes for t in range(50)]
    assert np.mean(sizes) == pytest.approx(16 + 16 + 4 * p * d, rel=0.01)
    assert len(set(sizes)) > 10
    assert not ef.RandomSparsify(p).fixed_size


@pytest.mark.parametrize("p", [0, -0.1, 1.01, math.nan])
def test_probabilities_out_of_range_are_refused(p):
    with pytest.raises(ValueError, match=r"expected a probability in \(0, 1\]"):
        ef.RandomSparsify(p)
    with pytest.raises(ValueError, match="scale='no', expected one of"):
        ef.RandomSparsify(0.1, scale="no")
