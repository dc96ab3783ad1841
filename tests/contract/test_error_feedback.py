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
        lr = 1.0 if step_inside is None else ef.methods.schedules.value_at(step_inside, t)
        messages, direction = workers.step(g, t)
        if step_inside is None:
            np.testing.assert_array_equal(direction, messages[0].decompress())
        sent += lr * direction.astype(np.float64)
        total += lr * g[0].astype(np.float64)
        error = workers.states[0].error
        size = np.abs(total) + np.abs(error) + np.abs(sent)
        np.testing.assert_array_less(np.abs(sent + error - total), 1e-5 * size + 1e-4)


@pytest.mark.parametrize("compressor", [ef.TopK(k=7), ef.OneBit()], ids=repr)
@pytest.mark.parametrize("decay", [0.5, 0.95])
def test_errors_fade_by_the_decay(compressor, decay):
    """local_updates.md section 1: e = decay e + g - sent; the sum of g no longer comes back."""
    workers = Workers(ef.ErrorFeedback(compressor, decay=decay))
    error, kept = np.zeros(D), np.zeros(D)
    for t, g in enumerate(gradients(1, 40)):
        sent = workers.step(g, t)[1].astype(np.float64)
        error = decay * error + g[0] - sent
        kept += sent - g[0]
        found = workers.states[0].error
        np.testing.assert_allclose(found, error, atol=1e-4 * np.abs(error).max())
    assert np.abs(kept + found).max() > 0.1 * np.abs(found).max()


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


REFUSED = [
    ef.QSGD(4, bucket=None),
    ef.QSGD(100, bucket=None),  # fine for a thousand numbers, but not for a million
    ef.TernGrad(),
    ef.Then(ef.RandomK(0.3, scale="unbiased"), ef.Natural()),
    ef.RandomSparsify(0.3, scale="unbiased"),
]
UNKNOWN = [  # biased, and without any bound
    ef.Then(ef.TopK(ratio=0.5), ef.QSGD(1)),
    ef.Then(ef.TopK(ratio=0.5), ef.OneBit("l2")),
    ef.Then(ef.HardThreshold(0.1), ef.QSGD(1)),
    ef.Then(ef.RandomK(0.3, scale="unbiased"), ef.Cast("float16")),
]
TAKEN = [
    ef.HardThreshold(1.0),
    ef.OneBit("l2"),
    ef.OneBit("l2", block=9),
    ef.TernGrad(clip=2.5),
    ef.Scaled(ef.QSGD(1)),
    ef.Scaled(ef.TernGrad()),
    ef.Then(ef.TopK(ratio=0.1), ef.Natural()),
    ef.Then(ef.HardThreshold(0.5), ef.QSGD(127)),
    ef.Then(ef.HardThreshold(0.5), ef.OneBit("l2")),
    ef.Then(ef.TopK(ratio=0.5), ef.Scaled(ef.QSGD(1))),
]


@pytest.mark.parametrize("compressor", REFUSED, ids=repr)
def test_unbiased_ones_with_a_large_variance_are_refused(compressor):
    with pytest.raises(ValueError, match=r"Scaled\(...\) or a smaller bucket for quantizers"):
        ef.ErrorFeedback(compressor)


@pytest.mark.parametrize("compressor", UNKNOWN, ids=repr)
def test_those_of_which_no_bound_is_known_are_refused(compressor):
    with pytest.raises(ValueError, match="of whose error no bound is known"):
        ef.ErrorFeedback(compressor)


@pytest.mark.parametrize("compressor", TAKEN, ids=repr)
@pytest.mark.parametrize("kind", ["gaussian", "constant", "one large"])
def test_those_that_are_taken_keep_the_memory_bounded(compressor, kind):
    """The memory of the last steps is no larger than that of earlier ones, for any gradients."""
    d, steps = 30, 600
    group, sizes = Workers(ef.ErrorFeedback(compressor), 1, d=d), []
    rng = np.random.default_rng(0)
    constant = {"constant": np.ones(d), "one large": np.eye(d)[3]}
    for t in range(steps):
        g = rng.normal(size=d) if kind == "gaussian" else constant[kind]
        group.step([g.astype(np.float32)], t)
        sizes.append(np.linalg.norm(group.states[0].error))
    assert max(sizes[steps // 2 :]) <= 1.5 * max(sizes[: steps // 2]) + 1e-5
    assert max(sizes) < 40 * np.sqrt(d)


def test_a_refused_one_makes_it_grow_for_ever():
    """The same without the guard: QSGD(1), whose omega is sqrt(d)."""
    d, error = 30, np.zeros(30, np.float32)
    rng = np.random.default_rng(0)
    for t in range(300):
        p = error + rng.normal(size=d).astype(np.float32)
        _, error = ef.QSGD(1).compress_with_residual(p, ef.Key(step=t))
    assert np.linalg.norm(error) > 1e8


@pytest.mark.parametrize("d", [1, 2, 9, 200])
@pytest.mark.parametrize("block", [None, 4])
def test_the_largest_magnitude_shrinks_with_the_l2_scale(d, block):
    """max |x - C(x)| <= sqrt(1 - 1 / b) max |x|, which ||x - C(x)|| does not."""
    rng, b = np.random.default_rng(d), min(block or d, d)
    flat_but_one = np.ones(d)
    flat_but_one[0] = 1e-6
    candidates = [rng.normal(size=d) ** power for power in (1, 3, 9)]
    for x in [*candidates, np.eye(d)[0], np.ones(d), flat_but_one]:
        x = x.astype(np.float32)
        _, lost = ef.OneBit("l2", block=block).compress_with_residual(x.copy())
        assert np.abs(lost).max() <= np.sqrt(1 - 1 / b) * np.abs(x).max() * (1 + 1e-5) + 1e-7


@pytest.mark.parametrize("clip", [0.5, 2.5, 100.0])
def test_the_largest_magnitude_shrinks_on_average_with_a_clip(clip):
    b = 20
    q = min(clip / np.sqrt(b), 1 / (2 * b))
    compressor = ef.TernGrad(clip=clip)
    rng = np.random.default_rng(0)
    for x in (rng.normal(size=b), np.eye(b)[0], np.ones(b), np.linspace(0.9, 1, b)):
        x = x.astype(np.float32)
        found = [
            np.abs(compressor.compress_with_residual(x.copy(), ef.Key(step=t))[1]).max()
            for t in range(2000)
        ]
        spread = 5 * np.std(found) / np.sqrt(2000)
        assert np.mean(found) <= (1 - q / 2) * np.abs(x).max() + spread + 1e-6


@each_compressor
@pytest.mark.parametrize("down", [None, ef.TopK(k=20)], ids=repr)
def test_no_feedback_is_the_mean_of_messages_compressed_again_on_the_way_down(compressor, down):
    workers = Workers(ef.NoFeedback(compressor, server_compressor=down), 3)
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
    with pytest.raises(
        ef.UnsupportedError, match=f"{method.__name__} got server_compressor=0.1, expected a"
    ):
        method(ef.TopK(k=3), server_compressor=0.1)


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
