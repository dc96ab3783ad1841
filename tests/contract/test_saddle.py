"""PerturbedCompressedSGD (Avdiukhin, Yaroslavtsev, NeurIPS 2021): noise, feedback and resets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from workers import COMPRESSORS, CONTRACTIONS, D, Workers, gradients

import ef_horovod as ef
from ef_horovod.methods.perturbed import normal

Perturbed = ef.PerturbedCompressedSGD
STEP = 0.25


def noisy(group, g, t, noise):
    """What the workers compress: gradients with the noise that each of them draws."""
    drawn = [normal(g.shape[1], group.key(t, i)) for i in range(group.count)]
    return g + noise * np.array(drawn, np.float64)


@pytest.mark.parametrize(
    ("reset", "compressor"),
    [("flush", compressor) for compressor in CONTRACTIONS]
    + [("drop", lossy) for lossy in (ef.TopK(k=5), ef.OneBit(), ef.RandomK(0.1))],
    ids=repr,
)
def test_the_virtual_iterate_survives_a_flush_and_no_drop(reset, compressor):
    """compressed_sgd_saddle.md section 8, item 1: x - eta mean_i e_i takes plain noisy steps."""
    noise, group = 0.1, Workers(Perturbed(compressor, 0.1, reset_every=7, reset=reset), 3)
    x, plain, gaps = np.zeros(D), np.zeros(D), []
    for t, g in enumerate(gradients(3, 21)):
        x -= STEP * group.step(g, t)[1].astype(np.float64)
        plain -= STEP * noisy(group, g, t, noise).mean(0)
        error = group.mean("error")
        gaps.append(np.abs(x - STEP * error - plain).max() / np.abs(plain).max())
        if t % 7 == 6:
            assert not np.any(error), "the error was not reset"
    assert max(gaps[:6]) < 1e-4
    assert (max(gaps) < 1e-4) == (reset == "flush")


def test_a_flush_sends_everything_on_all_ranks_alike():
    group = Workers(Perturbed(ef.TopK(k=5), reset_every=3), 2)
    sizes = [[m.nbytes for m in group.step(g, t)[0]] for t, g in enumerate(gradients(2, 6))]
    small, whole = [ef.TopK(k=5).nbytes(D)] * 2, [ef.Identity().nbytes(D)] * 2
    assert sizes == [small, small, whole] * 2


@pytest.mark.parametrize("method", [ef.ErrorFeedback, Perturbed, ef.EF21, ef.DoubleSqueeze])
def test_workers_with_shared_indices_are_one_worker_with_the_mean(method):
    """compressed_sgd_saddle.md section 8, item 2; integers and four workers, so to the last bit."""
    g = gradients(4, 30, integers=True)
    many, one = Workers(method(ef.RandomK(0.1)), 4), Workers(method(ef.RandomK(0.1)), 1)
    np.testing.assert_array_equal(many.run(g), one.run(g.mean(1, keepdims=True)))


def test_workers_with_indices_of_their_own_are_not():
    g = gradients(4, 30, integers=True)
    own = ef.RandomK(0.1, shared=False)
    many, one = Workers(ef.ErrorFeedback(own), 4), Workers(ef.ErrorFeedback(own), 1)
    assert np.abs(many.run(g) - one.run(g.mean(1, keepdims=True))).max() > 1


def test_every_entry_is_drawn_as_often_and_by_all_ranks_alike():
    """compressed_sgd_saddle.md section 8, item 3."""
    d, steps, counts = 50, 1000, np.zeros(50)
    compressor, x = ef.RandomK(0.2), np.ones(50, np.float32)
    for t in range(steps):
        first, second, other = (
            compressor.compress(x, ef.Key(seed, t, 0, rank)).decompress()
            for seed, rank in ((0, 0), (0, 7), (1, 0))
        )
        np.testing.assert_array_equal(first, second)
        counts += first
        assert t > 3 or not np.array_equal(first, other)
    assert counts.sum() == steps * d / 5
    assert np.abs(counts / steps - 0.2).max() < 5 * np.sqrt(0.2 * 0.8 / steps)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_without_noise_a_stationary_point_is_never_left(compressor):
    """compressed_sgd_saddle.md section 8, item 5."""
    for method in Perturbed.examples(compressor):
        still = Workers(Perturbed(compressor, 0.0, method.reset_every, method.reset), 2)
        assert not np.any(still.run(np.zeros((20, 2, D), np.float32)))
        loud = Workers(replace(method, noise=10.0), 2)
        assert np.all(np.any(loud.run(np.zeros((20, 2, D), np.float32)), axis=1))


def test_identity_is_noisy_sgd_with_no_error():
    """compressed_sgd_saddle.md section 8, item 6."""
    group = Workers(Perturbed(ef.Identity(), noise=0.5), 3)
    for t, g in enumerate(gradients(3, 10)):
        direction = group.step(g, t)[1]
        expected = noisy(group, g, t, 0.5).mean(0)
        np.testing.assert_allclose(direction, expected, atol=1e-6 * np.abs(expected).max())
        assert not any(np.any(state.error) for state in group.states)


def test_noise_is_normal_and_drawn_anew_for_each_worker_step_and_tensor():
    keys = [ef.Key(0, t, tensor, i) for t in range(3) for tensor in range(3) for i in range(3)]
    drawn = np.array([normal(4000, key) for key in keys], np.float64)
    assert drawn.mean() == pytest.approx(0, abs=0.02)
    assert drawn.std() == pytest.approx(1, abs=0.02)
    apart = np.corrcoef(drawn) - np.eye(len(keys))
    assert np.abs(apart).max() < 0.1
    np.testing.assert_array_equal(drawn[4], normal(4000, keys[4]))


@pytest.mark.parametrize(
    "method",
    [Perturbed(ef.TopK(ratio=0.1), 0.01), Perturbed(ef.TopK(ratio=0.1), 0.01, reset_every=50)],
    ids=repr,
)
def test_noise_escapes_a_strict_saddle(method):
    """compressed_sgd_saddle.md section 7 (a): within the iterations found there, and 1.5 times."""
    curvature = np.where(np.arange(100) == 0, -0.1, 1.0)

    def gradient(worker, x, t):
        return curvature * x + np.where(np.arange(100) == 0, x**3, 0)

    def value(x):
        return {"f": float(curvature @ x**2 / 2 + x[0] ** 4 / 4)}

    options = {"workers": 4, "steps": 1050, "step_size": 0.1, "observe": value}
    run = ef.simulate(method, gradient, np.zeros(100), **options)
    assert run.history[-1]["f"] < 0.9 * -0.0025
    assert run.history[200]["f"] > 0.9 * -0.0025
    still = ef.simulate(ef.ErrorFeedback(method.compressor), gradient, np.zeros(100), **options)
    assert not np.any(still.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": -0.1}, "got noise=-0.1"),
        ({"noise": float("nan")}, "got noise=nan"),
        ({"reset": "forget"}, "reset='forget', expected"),
        ({"reset_every": 0}, "got reset_every=0, expected a whole number of at least 1"),
    ],
    ids=repr,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Perturbed(ef.TopK(k=3), **options)
