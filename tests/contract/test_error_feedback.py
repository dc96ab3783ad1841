"""ErrorFeedback loses nothing; NoFeedback is the mean of messages."""

from __future__ import annotations

import numpy as np
import pytest
from workers import COMPRESSORS, CONTRACTIONS, D, FixedMask, Workers, gradients

import ef_horovod as ef

each_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
EXACT = [ef.TopK(k=7), ef.RandomK(0.1), ef.Identity()]


@pytest.mark.parametrize("compressor", CONTRACTIONS, ids=repr)
@pytest.mark.parametrize("step_inside", [None, 0.3, ef.Decay(0.5)], ids=repr)
def test_nothing_is_lost(compressor, step_inside):
    """sum(lr direction) + error == sum(lr gradients), with lr = 1 for errors in gradient units."""
    workers = Workers(ef.ErrorFeedback(compressor, step_inside=step_inside))
    sent, total = np.zeros(D), np.zeros(D)
    for t, g in enumerate(gradients(1, 60)):
        lr = 1.0 if step_inside is None else ef.schedules.value_at(step_inside, t)
        messages, direction = workers.step(g, t)
        if step_inside is None:
            np.testing.assert_array_equal(direction, messages[0].decompress())
        sent += lr * direction.astype(np.float64)
        total += lr * g[0].astype(np.float64)
        error = workers.states[0].error
        size = np.abs(total) + np.abs(error) + np.abs(sent)
        np.testing.assert_array_less(np.abs(sent + error - total), 1e-5 * size + 1e-4)


@pytest.mark.parametrize("compressor", EXACT, ids=repr)
def test_no_bit_of_integers_is_lost(compressor):
    workers = Workers(ef.ErrorFeedback(compressor))
    sent, total = np.zeros(D), np.zeros(D)
    for t, g in enumerate(gradients(1, 100, integers=True)):
        sent += workers.step(g, t)[1]
        total += g[0]
        np.testing.assert_array_equal(sent + workers.states[0].error, total)


@pytest.mark.parametrize("compressor", [*EXACT, ef.OneBit()], ids=repr)
def test_a_constant_step_inside_makes_no_difference_to_homogeneous_compressors(compressor):
    """With a power of two as learning rate, to the last bit."""
    outside = Workers(ef.ErrorFeedback(compressor), 3)
    inside = Workers(ef.ErrorFeedback(compressor, step_inside=0.25), 3)
    g = gradients(3, 30)
    np.testing.assert_array_equal(outside.run(g), inside.run(g))
    np.testing.assert_array_equal(outside.states[1].error, 4 * inside.states[1].error)


@pytest.mark.parametrize("step_inside", [True, False], ids=["inside", "outside"])
def test_the_virtual_iterate_survives_a_learning_rate_that_changes_only_with_the_step_inside(
    step_inside,
):
    """doublesqueeze.md section 1: errors in gradient units take on the new learning rate."""
    lr = ef.Decay(power=1, initial=0.5, offset=3)
    group = Workers(ef.ErrorFeedback(ef.TopK(k=7), step_inside=lr if step_inside else None), 3)
    x, plain, gaps = np.zeros(D), np.zeros(D), []
    for t, g in enumerate(gradients(3, 40)):
        x -= lr.at(t) * group.step(g, t)[1].astype(np.float64)
        plain -= lr.at(t) * g.mean(0, np.float64)
        owed = group.mean("error") * (1 if step_inside else lr.at(t))
        gaps.append(np.abs(x - owed - plain).max() / np.abs(plain).max())
    assert (max(gaps) < 1e-5) == step_inside
    assert step_inside or max(gaps) > 0.1


@pytest.mark.parametrize("step_inside", [0, -0.1, float("nan")])
def test_a_step_inside_that_is_no_learning_rate_is_refused(step_inside):
    with pytest.raises(ValueError, match="expected the optimizer's learning rate"):
        ef.ErrorFeedback(ef.OneBit(), step_inside=step_inside)


@pytest.mark.parametrize("make", [ef.ErrorFeedback, ef.DoubleSqueeze, ef.ErrorCompensatedX])
def test_compressors_that_amplify_are_refused(make):
    with pytest.raises(ValueError, match=f"{make.__name__} got .* whose error can be larger"):
        make(ef.RandomK(0.3, scale="unbiased"))


@each_compressor
@pytest.mark.parametrize("down", [None, ef.TopK(k=20)], ids=repr)
def test_no_feedback_is_the_mean_of_messages_compressed_again_on_the_way_down(compressor, down):
    workers = Workers(ef.NoFeedback(compressor, down=down), 3)
    for t, g in enumerate(gradients(3, 5)):
        direction = workers.step(g, t)[1]
        sent = [compressor.compress(g[i], workers.key(t, i)).decompress() for i in range(3)]
        expected = np.mean(sent, 0, np.float64).astype(np.float32)
        if down is not None:
            assert np.count_nonzero(direction) <= 20
            expected = np.where(direction != 0, expected, 0)
        np.testing.assert_allclose(direction, expected, atol=1e-6 * np.abs(sent).max())


@pytest.mark.parametrize(
    "method", [ef.NoFeedback, ef.DoubleSqueeze, ef.ErrorCompensatedX, ef.EF21], ids=repr
)
def test_only_a_compressor_can_answer(method):
    with pytest.raises(ef.UnsupportedError, match=f"{method.__name__} got down=0.1, expected a"):
        method(ef.TopK(k=3), down=0.1)


def test_ef21_with_a_fixed_mask_is_error_feedback():
    """ef21.md section 7, item 3: additive, homogeneous, deterministic compressors."""
    mask, g = FixedMask(0.3), gradients(3, 40)
    a, b = (Workers(method(mask), 3) for method in (ef.ErrorFeedback, ef.EF21))
    x, y = np.zeros(D), np.zeros(D)
    for t in range(40):  # gradients follow the iterates
        x -= 0.1 * a.step([g[t, i] + x.astype(np.float32) for i in range(3)], t)[1]
        y -= 0.1 * b.step([g[t, i] + y.astype(np.float32) for i in range(3)], t)[1]
        assert np.count_nonzero(x) == int(0.3 * D)
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(x).max())


def test_ef21_with_top_k_is_not_error_feedback():
    """The same with a compressor that is not additive."""
    g = gradients(3, 40)
    a, b = (Workers(method(ef.TopK(k=100)), 3) for method in (ef.ErrorFeedback, ef.EF21))
    assert np.abs(a.run(g).sum(0) - b.run(g).sum(0)).max() > 0.1
