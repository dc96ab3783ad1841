"""One bit with blocks and other scales, and random blocks: losses, places, and the class behind."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

import ef_horovod as ef
from ef_horovod.arrays.numpy_quantize import random_words
from ef_horovod.compressors.randomblock import _runs

D = 200
X = np.random.default_rng(0).normal(size=D).astype(np.float32)
KEY = ef.Key(seed=3, step=1)


def loss(compressor, x):
    decoded = compressor.compress(x.astype(np.float32), KEY).decompress().astype(float)
    return float(((decoded - x) ** 2).sum() / (x.astype(float) @ x))


# One bit


def test_one_bit_losses_are_those_of_the_formulas():
    x = X.astype(float)
    l1, norm2 = np.abs(x).sum(), x @ x
    assert loss(ef.OneBit(), X) == pytest.approx(1 - l1**2 / (D * norm2), rel=1e-6)
    expected = 2 - 2 * l1 / math.sqrt(D * norm2)
    assert loss(ef.OneBit("l2"), X) == pytest.approx(expected, rel=1e-6)
    one_hot = np.eye(1, D).ravel()
    assert loss(ef.OneBit(), one_hot) == pytest.approx(0.995, abs=1e-3)
    assert loss(ef.OneBit("l2"), one_hot) == pytest.approx(1.859, abs=1e-3)
    assert ef.OneBit("l2").contraction(D) is ef.OneBit("l2", block=8).contraction(D) is None
    gaussian = np.random.default_rng(8).normal(size=10**6)
    assert loss(ef.OneBit(), gaussian) == pytest.approx(0.363, abs=2e-3)
    assert loss(ef.OneBit("l2"), gaussian) == pytest.approx(0.404, abs=2e-3)


def test_two_means_keep_the_sum_and_lose_no_more_than_one():
    x = X + np.float32(0.3)
    decoded = ef.OneBit("two_means").compress(x).decompress().astype(float)
    assert decoded.sum() == pytest.approx(x.sum(dtype=float), rel=1e-5)
    classes = [x[x >= 0].astype(float), x[x < 0].astype(float)]
    within = sum(part.var() * part.size for part in classes)
    assert ((decoded - x) ** 2).sum() == pytest.approx(within, rel=1e-5)
    assert within / (x.astype(float) @ x) == pytest.approx(0.350, abs=0.05)
    rng = np.random.default_rng(9)
    for shift in (0, 1, 5, -5):
        other = (rng.normal(size=77) ** 3 + shift).astype(np.float32)
        assert loss(ef.OneBit("two_means"), other) <= loss(ef.OneBit(), other) + 1e-6
    one_hot = np.eye(1, 50).ravel()
    assert loss(ef.OneBit("two_means"), one_hot) == pytest.approx(1 - 1 / 50)
    assert ef.OneBit("two_means", block=50).contraction(1000) == 1 / 50


def test_a_mean_for_each_block():
    x = X[:64].astype(float).reshape(8, 8)
    expected = 1 - (np.abs(x).sum(1) ** 2 / 8).sum() / (x**2).sum()
    assert loss(ef.OneBit(block=8), x.ravel()) == pytest.approx(expected, rel=1e-5)
    signs, mean = np.sign(x), np.abs(x).mean(1, keepdims=True)
    losses = [((x - factor * mean * signs) ** 2).sum() for factor in (0.8, 0.9, 1, 1.1, 1.2)]
    assert min(losses) == losses[2]
    whole, one_block = ef.OneBit().compress(X), ef.OneBit(block=D).compress(X)
    np.testing.assert_allclose(whole.decompress(), one_block.decompress(), rtol=1e-6)


def test_zeros_are_positive_and_a_class_may_be_empty():
    x = np.float32([0.0, -0.0, 4.0, -1.0])
    decoded = ef.OneBit("two_means").compress(x).decompress()
    np.testing.assert_allclose(decoded, [4 / 3, 4 / 3, 4 / 3, -1], rtol=1e-6)
    ones = np.ones(9, np.float32)
    assert ef.OneBit("two_means").compress(-ones).decompress().tolist() == (-ones).tolist()
    assert ef.OneBit("two_means", block=2).compress(ones).decompress().tolist() == ones.tolist()


def test_one_bit_is_one_class_to_its_users():
    general = ef.OneBit("two_means", block=8)
    assert isinstance(general, ef.OneBit)
    assert type(general) is ef.OneBitBlocks
    assert type(ef.OneBit("l2")) is ef.OneBit
    assert eval(repr(general), {"OneBit": ef.OneBit}) == general
    assert repr(ef.OneBit()) == "OneBit()"
    assert pickle.loads(pickle.dumps(general)) == general
    assert len({general, ef.OneBit("two_means", 8), ef.OneBit(), ef.OneBit("l1")}) == 2


# Random blocks


@pytest.mark.parametrize(("ratio", "block", "d"), [(0.3, 4, 31), (0.05, 4096, 40), (0.9, 3, 20)])
def test_each_entry_is_in_a_run_equally_often(ratio, block, d):
    compressor, count, steps = ef.RandomBlock(ratio, block=block), np.zeros(d), 4000
    k = max(1, int(ratio * d))
    for step in range(steps):
        kept = compressor.compress(np.ones(d), ef.Key(step=step)).decompress()
        assert np.count_nonzero(kept) == k
        rises = np.count_nonzero((kept > 0) & (np.roll(kept, 1) == 0))
        assert rises <= -(-k // block)
        count += kept
    share = k / d
    assert np.abs(count / steps - share).max() < 5 * math.sqrt(share * (1 - share) / steps)


def test_all_entries_in_random_blocks_are_the_vector():
    x = np.arange(1000, dtype=np.float32)
    for block in (1, 7, 4096):
        payload, residual = ef.RandomBlock(1.0, block=block).compress_with_residual(x.copy(), KEY)
        assert np.array_equal(payload.decompress(), x)
        assert not residual.any()


def test_runs_by_hand():
    """The formula of docs/wire-format.md."""
    words = [int(word) for word in random_words(77, 4)]
    d, k, block = 100, 25, 10
    gaps = sorted(word % (d - k + 1) for word in words[1:])
    expected = [
        (gap + i * block + words[0] % d + j) % d
        for i, gap in enumerate(gaps)
        for j in range(min(block, k - i * block))
    ]
    found = [i for start, stop in _runs(77, k, block, d) for i in range(start, stop)]
    assert found == expected
    assert len(set(found)) == k
