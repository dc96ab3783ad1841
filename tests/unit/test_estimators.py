"""What estimators make of gradients: with averaging and no compression, the textbook methods."""

from __future__ import annotations

import numpy as np
import pytest
from workers import Quadratics

import ef_horovod as ef
from ef_horovod.methods.schedules import value_at

N, D, STEPS, GAMMA = 3, 12, 25, 0.05
PROBLEM = Quadratics.draw(N, D, spread=0.2)
ALPHAS = [0.3, 1.0, ef.Decay(2 / 3), ef.Decay(1)]
each_alpha = pytest.mark.parametrize("alpha", ALPHAS, ids=repr)


def sample(worker, x, step):
    """A noisy gradient: noise in slope and in curvature, both of the sample (worker, step)."""
    rng = np.random.default_rng([worker, step])
    return PROBLEM.A[worker] @ x * rng.uniform(0.5, 1.5) - PROBLEM.b[worker] + rng.normal(size=D)


def mean_sample(x, step):
    return np.mean([sample(i, x, step) for i in range(N)], axis=0)


def directions(method, estimator, gradient=sample):
    """x_t, float64[STEPS + 1, d], of a simulated run."""
    xs = [np.ones(D)]
    ef.simulate(
        method,
        gradient,
        np.ones(D),
        workers=N,
        steps=STEPS,
        step_size=GAMMA,
        estimator=estimator,
        observe=lambda x: xs.append(x) or {},
    )
    return np.array(xs)


def textbook(direction):
    """The same of x -= GAMMA v_t with v_t = direction(x, x_before, v_before, t)."""
    xs, v = [np.ones(D)], np.zeros(D)
    for t in range(STEPS):
        v = direction(xs[-1], xs[-2] if t else xs[-1], v, t)
        xs.append(xs[-1] - GAMMA * v)
    return np.array(xs)


def averaging(alpha):
    return ef.ErrorCompensatedX(ef.Identity(), alpha=alpha, beta=1.0)


@each_alpha
def test_plain_gradients_are_averaged(alpha):
    """ecx.md section 2: momentum SGD."""

    def direction(x, before, v, t):
        now = value_at(alpha, t)
        return (1 - now) * v + now * mean_sample(x, t)

    run = directions(averaging(alpha), ef.Estimator())
    np.testing.assert_allclose(run, textbook(direction), atol=5e-5)


@pytest.mark.parametrize(
    ("alpha", "estimator"), [*((a, ef.STORM(a)) for a in ALPHAS), (ef.Decay(1.0), ef.ROOTSGD())],
    ids=repr,
)  # fmt: skip
def test_storm_is_the_textbook_storm(alpha, estimator):
    """ecx.md section 2: v = g_t + (1 - alpha) (v - g_{t-1}), both gradients on one sample."""

    def direction(x, before, v, t):
        if t == 0:
            return value_at(alpha, 0) * mean_sample(x, 0)  # (F1) with v_{-1} = 0
        return mean_sample(x, t) + (1 - value_at(alpha, t)) * (v - mean_sample(before, t))

    run = directions(averaging(alpha), estimator)
    np.testing.assert_allclose(run, textbook(direction), atol=5e-5)


@each_alpha
def test_igt_averages_gradients_at_transported_points(alpha):
    """ecx.md section 2."""

    def direction(x, before, v, t):
        now = value_at(alpha, t)
        return (1 - now) * v + now * mean_sample(x + (1 - now) / now * (x - before), t)

    run = directions(averaging(alpha), ef.IGT(alpha))
    np.testing.assert_allclose(run, textbook(direction), atol=5e-5)


def page_sample(page):
    """Of all of the data, without noise, where PAGE asks for it."""

    def gradient(worker, x, step):
        if page.whole(step):
            return PROBLEM.A[worker] @ x - PROBLEM.b[worker]
        return sample(worker, x, step)

    return gradient


def test_page_restarts_now_and_then_and_follows_differences_between():
    """ef21.md section 3."""
    page = ef.PAGE(0.3, seed=5)
    assert 1 < sum(page.whole(t) for t in range(STEPS)) < STEPS - 1

    def direction(x, before, v, t):
        if page.whole(t):
            return PROBLEM.gradients(x).mean(0)
        return v + mean_sample(x, t) - mean_sample(before, t)

    run = directions(ef.EF21(ef.Identity()), page, page_sample(page))
    np.testing.assert_allclose(run, textbook(direction), atol=5e-5)


@pytest.mark.parametrize("compressor", [ef.TopK(k=3), ef.OneBit()], ids=repr)
def test_page_with_full_gradients_only_is_ef21(compressor):
    """ef21.md section 7, item 7: EF21-PAGE with p = 1."""
    page = ef.PAGE(1.0)
    run = directions(ef.EF21(compressor), page, page_sample(page))
    plain = directions(ef.EF21(compressor), ef.Estimator(), page_sample(page))
    np.testing.assert_array_equal(run, plain)


def test_page_tosses_one_coin_for_all_as_often_as_asked():
    heads = [ef.PAGE(0.3).whole(t) for t in range(2000)]
    assert heads[0]
    assert np.mean(heads) == pytest.approx(0.3, abs=5 * np.sqrt(0.21 / 2000))
    assert heads != [ef.PAGE(0.3, seed=1).whole(t) for t in range(2000)]
    assert all(ef.PAGE(1.0).whole(t) for t in range(100))


@pytest.mark.parametrize(
    ("estimator", "calls"),
    [
        (ef.Estimator(), 1),
        (ef.STORM(1.0), 1),
        (ef.STORM(0.5), 2),
        (ef.IGT(0.5), 1),
        (ef.PAGE(1.0), 1),
    ],
    ids=repr,
)
def test_no_gradient_is_asked_for_in_vain(estimator, calls):
    x = np.ones(3)
    assert len(estimator.points(x, x, 0)) == 1
    assert len(estimator.points(x, x, 1)) == calls


@pytest.mark.parametrize(
    ("estimator", "method", "message"),
    [
        (ef.STORM(0.1), ef.EF21(ef.TopK(k=3)), "averages with alpha=0.1"),
        (ef.STORM(0.1), averaging(0.2), "averages with alpha=0.1"),
        (ef.ROOTSGD(), averaging(1.0), "averages with alpha=Decay"),
        (ef.IGT(0.1), ef.DoubleSqueeze(ef.TopK(k=3)), "averages with alpha=0.1"),
        (ef.PAGE(0.5), averaging(0.2), "a method that does not average"),
        (ef.PAGE(0.5), ef.EF21(ef.TopK(k=3), momentum=0.1), "a method that does not average"),
    ],
    ids=repr,
)
def test_an_estimator_for_another_method_is_refused(estimator, method, message):
    with pytest.raises(ef.UnsupportedError, match=message):
        directions(method, estimator)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="got alpha=0, expected a weight"):
        ef.STORM(0)
    with pytest.raises(ValueError, match="PAGE got probability=0, expected a number in"):
        ef.PAGE(0)


def test_variance_reduction_pays():
    """ROOT-SGD ends nearer to the optimum than uncompressed SGD with the same steps."""
    compressed = ef.ErrorCompensatedX(
        ef.TopK(ratio=0.5), server_compressor=ef.OneBit(), alpha=ef.Decay(1.0)
    )
    gaps = []
    for method, estimator in (
        (ef.NoFeedback(ef.Identity()), ef.Estimator()),
        (compressed, ef.ROOTSGD()),
    ):
        gap = []
        ef.simulate(
            method,
            sample,
            np.ones(D),
            workers=N,
            steps=800,
            step_size=GAMMA,
            estimator=estimator,
            observe=lambda x, gap=gap: gap.append(PROBLEM.gap(x)) or {},
        )
        gaps.append(np.mean(gap[-300:]))
    assert gaps[1] < gaps[0] / 4
