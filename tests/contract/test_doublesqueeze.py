"""DoubleSqueeze (Tang et al., ICML 2019): two error memories, nothing lost on either way."""

from __future__ import annotations

import numpy as np
import pytest
from workers import CONTRACTIONS, D, Workers, gradients

import ef_horovod as ef

each_contraction = pytest.mark.parametrize("compressor", CONTRACTIONS, ids=repr)
EXACT = [ef.Identity(), ef.TopK(k=25), ef.RandomK(0.1)]
STEP = 0.25


def test_identity_is_sgd():
    """doublesqueeze.md section 4, item 1."""
    g = gradients(4, 20, integers=True)
    directions = Workers(ef.DoubleSqueeze(ef.Identity()), 4).run(g)
    np.testing.assert_array_equal(directions, g.mean(1))


@pytest.mark.parametrize("compressor", EXACT, ids=repr)
def test_no_bit_of_integers_is_lost_on_either_way(compressor):
    """doublesqueeze.md section 4, item 2; four workers, so that means are exact."""
    group = Workers(ef.DoubleSqueeze(compressor, server_compressor=compressor), 4)
    said, answered, total = np.zeros((4, D)), np.zeros(D), np.zeros((4, D))
    for t, g in enumerate(gradients(4, 60, integers=True)):
        messages, direction = group.step(g, t)
        said += [message.decompress() for message in messages]
        answered += direction
        total += g
        errors = np.array([state.error for state in group.states])
        np.testing.assert_array_equal(said + errors, total)
        np.testing.assert_array_equal(answered + group.server.error, said.mean(0))


@each_contraction
def test_little_is_lost_by_rounding(compressor):
    group = Workers(ef.DoubleSqueeze(compressor, server_compressor=compressor), 3)
    g = gradients(3, 60)
    answered = group.run(g).sum(0, np.float64)
    total = g.mean(1, np.float64).sum(0)
    whole = answered + group.server.error + group.mean("error")
    size = np.abs(total) + np.abs(answered) + np.abs(group.server.error)
    np.testing.assert_array_less(np.abs(whole - total), 1e-4 * size.max())


@pytest.mark.parametrize("down", [ef.TopK(k=25), ef.OneBit(), ef.Identity()], ids=repr)
@pytest.mark.parametrize("up", [ef.TopK(k=50), ef.OneBit()], ids=repr)
def test_the_virtual_iterate_takes_plain_steps(up, down):
    """doublesqueeze.md section 4, item 3: x - gamma (delta + mean_i delta_i)."""
    group = Workers(ef.DoubleSqueeze(up, server_compressor=down), 5)
    x, plain = np.zeros(D), np.zeros(D)
    for t, g in enumerate(gradients(5, 50)):
        g = g + x.astype(np.float32)  # gradients follow the iterates
        x -= STEP * group.step(g, t)[1].astype(np.float64)
        plain -= STEP * g.mean(0, np.float64)
        virtual = x - STEP * (group.server.error + group.mean("error"))
        np.testing.assert_allclose(virtual, plain, atol=1e-5 * np.abs(plain).max())
    assert np.abs(x - plain).max() > 1e-3 * np.abs(plain).max()


@each_contraction
def test_without_compression_on_the_way_down_it_is_mem_sgd(compressor):
    """doublesqueeze.md section 4, item 4."""
    double = Workers(ef.DoubleSqueeze(compressor), 3)
    single = Workers(ef.ErrorFeedback(compressor), 3)
    for t, g in enumerate(gradients(3, 30)):
        messages, direction = double.step(g, t)
        others, expected = single.step(g, t)
        assert [bytes(m) for m in messages] == [bytes(m) for m in others]
        np.testing.assert_array_equal(direction, expected)
        assert not np.any(double.server.error)


def test_with_one_error_memory_something_is_lost():
    """doublesqueeze.md section 8: why the aggregator needs one of its own."""
    group, g = (
        Workers(ef.NoFeedback(ef.Identity(), server_compressor=ef.TopK(k=25)), 3),
        gradients(3, 60),
    )
    total = g.mean(1, np.float64).sum(0)
    assert np.linalg.norm(group.run(g).sum(0) - total) > 0.2 * np.linalg.norm(total)
