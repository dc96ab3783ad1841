"""Hard thresholds (Sahu et al., NeurIPS 2021): what holds exactly, through the real operator.

`tests/unit/test_theory_budget.py` has the same for the functions that choose a threshold.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from workers import Workers, gradients

import ef_horovod as ef
from ef_horovod import theory

D = 60


def untied(shape):
    """float32 arrays of different magnitudes, so that volumes are met exactly."""
    positive = st.floats(2.0**-10, 99, width=32)
    numbers = arrays(np.float32, shape, elements=positive, fill=st.nothing(), unique=True)
    signs = arrays(np.float32, shape, elements=st.sampled_from([-1.0, 1.0]))
    return st.builds(np.multiply, numbers, signs)


def kept(compressor, x):
    """How many entries of x are sent; none of x's is zero."""
    return int(np.count_nonzero(compressor.compress(x).decompress()))


def lost(compressor, vectors):
    """sum_t ||x_t - C(x_t)||^2."""
    residuals = [compressor.compress_with_residual(x.copy())[1].astype(float) for x in vectors]
    return float(sum(np.sum(residual**2) for residual in residuals))


def decaying(steps=50, d=30):
    """float32[steps, d]: heavy tails that decay, on which top-k spends its entries badly."""
    rng = np.random.default_rng(0)
    return (rng.standard_t(2, size=(steps, d)) * 0.93 ** np.arange(steps)[:, None]).astype("f4")


@given(vectors=untied((4, 6)), total=st.integers(1, 23))
@settings(max_examples=100)
def test_no_selection_of_as_many_entries_of_a_fixed_sequence_loses_less(vectors, total):
    threshold = theory.optimal_threshold(vectors, total)
    compressor = ef.HardThreshold(threshold)
    assert sum(kept(compressor, x) for x in vectors) == total
    best = np.sort(np.abs(vectors).astype(float).ravel())[: vectors.size - total]
    assert lost(compressor, vectors) == pytest.approx(float(np.sum(best**2)), rel=1e-12)
    assert lost(compressor, vectors) == pytest.approx(
        theory.dropped_error(vectors, threshold), rel=1e-12
    )
    if total % len(vectors) == 0:
        assert lost(compressor, vectors) <= lost(ef.TopK(k=total // len(vectors)), vectors) * (
            1 + 1e-12
        )


def test_the_volume_of_top_k_is_spent_better():
    vectors = decaying()
    threshold = theory.optimal_threshold(vectors, 3 * len(vectors))
    assert lost(ef.HardThreshold(threshold), vectors) < 0.5 * lost(ef.TopK(k=3), vectors)


@given(x=untied(40), k=st.integers(1, 39))
@settings(max_examples=100)
def test_the_kth_magnitude_as_threshold_is_top_k(x, k):
    threshold = float(np.sort(np.abs(x))[-k])
    a = ef.HardThreshold(threshold).compress(x)
    b = ef.TopK(k=k).compress(x)
    assert a.data[16:].tobytes() == b.data[16:].tobytes()  # the body is the same format


@pytest.mark.parametrize("threshold", [0.05, 0.7, 3.0])
def test_error_feedback_keeps_every_entry_below_the_threshold(threshold):
    """For any gradients; and what was sent and what is kept add up to all gradients."""
    group = Workers(ef.ErrorFeedback(ef.HardThreshold(threshold)), 1, d=D)
    sent, total = np.zeros(D), np.zeros(D)
    for t, g in enumerate(gradients(1, 200, d=D) * np.float32(0.4)):
        spike = np.float32(100 * (t % 17 == 0))
        g[0, t % D] += spike
        sent += group.step(g, t)[1]
        total += g[0]
        error = group.states[0].error
        assert np.abs(error).max() < threshold
        assert np.sum(error.astype(float) ** 2) < D * threshold**2
    np.testing.assert_allclose(sent + error, total, atol=2e-3)


def test_integers_telescope_to_the_last_bit():
    group = Workers(ef.ErrorFeedback(ef.HardThreshold(5.0)), 1, d=D)
    sent, total = np.zeros(D), np.zeros(D)
    for t, g in enumerate(gradients(1, 200, d=D, integers=True)):
        sent += group.step(g, t)[1]
        total += g[0]
        np.testing.assert_array_equal(sent + group.states[0].error, total)


def test_thresholds_at_both_ends():
    x = gradients(1, 1, d=D)[0, 0]
    everything = ef.HardThreshold(float(np.abs(x).min()))
    np.testing.assert_array_equal(everything.compress(x).decompress(), x)
    group = Workers(ef.ErrorFeedback(ef.HardThreshold(1e30)), 1, d=D)
    g = gradients(1, 30, d=D, integers=True)
    assert not group.run(g).any()
    np.testing.assert_array_equal(group.states[0].error, g.sum((0, 1)))


def test_layers_or_the_whole_vector_give_the_same_bits():
    x = gradients(1, 1, d=D)[0, 0]
    cuts = [0, 7, 30, D]
    threshold, top = ef.HardThreshold(0.5), ef.TopK(ratio=0.2)

    def layers(compressor):
        parts = [x[a:b] for a, b in itertools.pairwise(cuts)]
        return np.concatenate([compressor.compress(part).decompress() for part in parts])

    np.testing.assert_array_equal(layers(threshold), threshold.compress(x).decompress())
    assert not np.array_equal(layers(top), top.compress(x).decompress())


@pytest.mark.parametrize("scale", [0.25, 2.0, 64.0])
def test_it_is_not_homogeneous_unless_the_threshold_is_scaled_too(scale):
    x, threshold = gradients(1, 1, d=D)[0, 0], 0.5
    scaled = ef.HardThreshold(threshold).compress(np.float32(scale) * x).decompress()
    same = np.float32(scale) * ef.HardThreshold(threshold / scale).compress(x).decompress()
    np.testing.assert_array_equal(scaled, same)
    other = np.float32(scale) * ef.HardThreshold(threshold).compress(x).decompress()
    assert not np.array_equal(scaled, other)


def test_the_step_inside_asks_for_a_threshold_in_units_of_the_step():
    g, lr = gradients(3, 30, d=D), 0.25  # a power of two: to the last bit
    outside = Workers(ef.ErrorFeedback(ef.HardThreshold(2.0)), 3, d=D).run(g)
    inside = ef.ErrorFeedback(ef.HardThreshold(2.0 * lr), step_inside=lr)
    np.testing.assert_array_equal(Workers(inside, 3, d=D).run(g), outside)
    unscaled = ef.ErrorFeedback(ef.HardThreshold(2.0), step_inside=lr)
    assert not np.array_equal(Workers(unscaled, 3, d=D).run(g), outside)


def test_a_rank_without_entries_counts_in_the_mean():
    group = Workers(ef.ErrorFeedback(ef.HardThreshold(1.0)), 3, d=4)
    loud = np.array([3.0, 0, 0, -6.0], np.float32)
    quiet = np.full(4, 0.5, np.float32)
    messages, direction = group.step([loud, quiet, quiet])
    assert [int(message.data[16:20].view("<u4")[0]) for message in messages] == [2, 0, 0]
    np.testing.assert_array_equal(direction, loud / np.float32(3))


def test_calibration_meets_a_budget_of_messages():
    """Bisection over whole runs of the real method; 1 / (2 sqrt(k)) fits gradients of its scale."""
    g = gradients(1, 60, d=D)

    def average(threshold):
        group = Workers(ef.ErrorFeedback(ef.HardThreshold(threshold)), 1, d=D)
        messages = [group.step(gradient, t)[0][0] for t, gradient in enumerate(g)]
        return np.mean([int(message.data[16:20].view("<u4")[0]) for message in messages])

    found = theory.calibrate(average, target=6.0, tolerance=0.05)
    assert average(found.threshold) == pytest.approx(6.0, rel=0.05)
    assert theory.threshold_from_budget(6.0) == pytest.approx(1 / (2 * np.sqrt(6.0)))
    assert average(theory.threshold_from_budget(6.0)) > 12  # another scale: that is its limit
