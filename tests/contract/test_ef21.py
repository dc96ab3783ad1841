"""EF21 tracks gradients: invariants of Richtarik, Sokolov, Fatkhullin (NeurIPS 2021)."""

from __future__ import annotations

import numpy as np
import pytest
from workers import (
    COMPRESSORS,
    CONTRACTIONS,
    DETERMINISTIC,
    METHODS,
    D,
    Quadratics,
    Workers,
    gradients,
)

import ef_horovod as ef
from ef_horovod.compressors.base import Payload
from ef_horovod.methods import registry

EF21S = [method for method in METHODS if isinstance(method, ef.EF21)]
each_ef21 = pytest.mark.parametrize("method", EF21S, ids=repr)
# What these decode to is exact in float32 while the numbers are integers: sums have no rounding.
EXACT = [
    ef.EF21(compressor, **options)
    for compressor in (ef.Identity(), ef.TopK(ratio=0.1), ef.TopK(k=3), ef.RandomK(0.2))
    for options in ({}, {"momentum": 1.0}, {"momentum": 0.5}, {"participation": 0.5})
]
OPTIONS = [
    {},
    {"server_compressor": ef.Identity()},
    {"participation": 1.0},
    {"weights": (2.0,) * 4},
]


def theta(alpha):
    return 1 - np.sqrt(1 - alpha)


def beta(alpha):
    return (1 - alpha) / theta(alpha)


def xi(alpha):
    return np.sqrt(beta(alpha) / theta(alpha))


def test_there_are_enough_instances():
    assert len(EF21S) == 4 * len(CONTRACTIONS) >= 20
    for compressor in set(COMPRESSORS) - set(CONTRACTIONS):
        assert registry.METHODS["EF21"].examples(compressor) == ()
        assert registry.METHODS["EF21Plus"].examples(compressor) == ()


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
@pytest.mark.parametrize("integers", [True, False])
def test_identity_is_gradient_descent(options, integers):
    """ef21.md section 7, item 1; with integers, for which h + (g - h) is exact, to the bit."""
    g = gradients(4, 30, integers=integers)
    directions = Workers(ef.EF21(ef.Identity(), **options), 4).run(g)
    expected = g.mean(1, np.float64)
    tolerance = 0 if integers else 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(directions, expected, rtol=0, atol=tolerance)


def test_identity_minimises_as_gradient_descent_does():
    targets = np.random.default_rng(0).integers(-8, 8, size=(2, 20)).astype(np.float64)
    arguments = {"workers": 2, "steps": 12, "step_size": 0.5}
    x0 = np.zeros(20)
    run = ef.simulate(ef.EF21(ef.Identity()), lambda i, x, t: x - targets[i], x0, **arguments)
    x = x0.copy()
    for _ in range(arguments["steps"]):
        x = x - arguments["step_size"] * (x - targets.mean(0))
    np.testing.assert_array_equal(run.x, x)


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("method", EXACT, ids=repr)
def test_mean_of_tracked_gradients_is_the_direction_to_the_last_bit(method, workers):
    """ef21.md section 7, item 2."""
    group = Workers(method, workers)
    steps = 12 if method.momentum == 0.5 else 60  # a halving a step: dyadic, until bits run out
    for t, g in enumerate(gradients(workers, steps, integers=True)):
        direction = group.step(g, t)[1]
        total = np.sum([state.tracked for state in group.states], axis=0, dtype=np.float64)
        np.testing.assert_array_equal(group.server.total, total)
        np.testing.assert_array_equal(direction, total.astype(np.float32) / np.float32(workers))


@each_ef21
def test_mean_of_tracked_gradients_stays_within_rounding(method):
    group = Workers(method, 3)
    group.run(gradients(3, 300))
    mean = group.mean("tracked")
    np.testing.assert_allclose(group.server.total / 3, mean, atol=1e-4 * np.abs(mean).max())


@each_ef21
def test_tracked_gradient_is_what_receivers_decode(method):
    """A rank adds to its own h_i what the others decode from its bytes, to the last bit."""
    group, believed = Workers(method), np.zeros(D, np.float32)
    for t, g in enumerate(gradients(1, 50)):
        (message,), _ = group.step(g, t)
        Payload.from_bytes(bytes(message)).add_to(believed)
        assert believed.tobytes() == group.states[0].tracked.tobytes()


@pytest.mark.parametrize("compressor", DETERMINISTIC, ids=repr)
def test_one_step_contracts_as_the_lemma_says(compressor):
    """ef21.md section 7, item 4, for any g, h and h'."""
    alpha, rng = compressor.contraction(D), np.random.default_rng(1)
    for _ in range(30):
        h, before, after = (
            (rng.normal(size=D) ** 3 * rng.exponential()).astype(np.float32) for _ in range(3)
        )
        group = Workers(ef.EF21(compressor))
        group.states[0].tracked[:] = h
        group.step([after])
        left = _squared(group.states[0].tracked - after)
        moved, distance = _squared(after - before), _squared(h - before)
        limit = (1 - theta(alpha)) * distance + (beta(alpha) * moved if alpha < 1 else 0)
        assert left <= limit + 1e-9 * _squared(after)


def _squared(x):
    return float(np.sum(np.square(x, dtype=np.float64)))


def descend(problem, method, step_size, steps):
    """(x_t, h_i^t) along a run from far away; gradients are those of `problem`."""
    n, d = problem.b.shape
    group, x = Workers(method, n, d=d), np.full(d, 3.0)
    for t in range(steps):
        direction = group.step(problem.gradients(x).astype(np.float32), t)[1]
        yield x.copy(), np.array([state.tracked for state in group.states], np.float64)
        x -= step_size * direction.astype(np.float64)


LYAPUNOV_COMPRESSORS = [ef.TopK(k=1), ef.TopK(k=5), ef.OneBit()]


@pytest.mark.parametrize("compressor", LYAPUNOV_COMPRESSORS, ids=repr)
@pytest.mark.parametrize("mean", ["quadratic", "arithmetic"])
def test_the_lyapunov_function_never_rises(compressor, mean):
    """ef21.md section 7, item 5: f - f_inf + gamma / (2 theta) G, with G weighted for L_AM."""
    problem = Quadratics.draw()
    n, d = problem.b.shape
    L_i, alpha = problem.L_i, compressor.contraction(d)
    weights = np.full(n, 1 / n) if mean == "quadratic" else L_i / L_i.sum()
    typical = np.sqrt(np.mean(L_i**2)) if mean == "quadratic" else L_i.mean()
    gamma = 1 / (problem.L + typical * xi(alpha))
    values = []
    for x, tracked in descend(problem, ef.EF21(compressor), gamma, 400):
        off = np.sum((tracked - problem.gradients(x)) ** 2, axis=1)
        G = np.sum(off / (n**2 * weights))
        values.append(problem.gap(x) + gamma / (2 * theta(alpha)) * G)
    values = np.array(values)
    assert np.all(np.diff(values) <= 1e-6 * values[:-1])
    assert values[-1] < 0.9 * values[0]


def test_the_arithmetic_mean_allows_longer_steps():
    L_i = Quadratics.draw().L_i
    assert L_i.mean() < 0.75 * np.sqrt(np.mean(L_i**2))


@pytest.mark.parametrize("compressor", LYAPUNOV_COMPRESSORS, ids=repr)
def test_convergence_is_linear_as_the_theorem_says(compressor):
    """ef21.md sections 2 and 7, item 5: Psi^t <= (1 - gamma mu)^t Psi^0."""
    problem = Quadratics.draw(spread=0.3)
    alpha, mu = compressor.contraction(20), problem.mu
    L_QM = np.sqrt(np.mean(problem.L_i**2))
    gamma = 1 / (problem.L + L_QM * np.sqrt(2 * beta(alpha) / theta(alpha)))
    gamma = min(gamma, theta(alpha) / (2 * mu))
    psi = []
    for x, tracked in descend(problem, ef.EF21(compressor), gamma, 1000):
        G = np.mean(np.sum((tracked - problem.gradients(x)) ** 2, axis=1))
        psi.append(problem.gap(x) + gamma / theta(alpha) * G)
    limit = (1 - gamma * mu) ** np.arange(1000) * psi[0]
    assert np.all(psi <= limit * (1 + 1e-6) + 1e-9)
    assert psi[-1] < 0.5 * psi[0]


@pytest.mark.parametrize("compressor", LYAPUNOV_COMPRESSORS, ids=repr)
def test_the_lyapunov_function_of_weighted_ef21_never_rises(compressor):
    """ef21.md section 5: sum_i w_i ||h_i - grad f_i / (n w_i)||^2 with gamma of L_AM."""
    problem = Quadratics.draw()
    n, alpha, L_i = len(problem.b), compressor.contraction(20), problem.L_i
    weights = L_i / L_i.sum()
    gamma = 1 / (problem.L + L_i.mean() * xi(alpha))
    values = []
    for x, tracked in descend(problem, ef.EF21(compressor, weights=L_i), gamma, 400):
        wanted = problem.gradients(x) / (n * weights[:, None])
        G = np.sum(weights * np.sum((tracked - wanted) ** 2, axis=1))
        values.append(problem.gap(x) + gamma / (2 * theta(alpha)) * G)
    values = np.array(values)
    assert np.all(np.diff(values) <= 1e-6 * values[:-1])
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("k", [1, 50, 499])
def test_a_frozen_gradient_is_found_after_d_over_k_steps(k):
    """ef21.md section 7, item 8."""
    g = gradients(1, 1)[0]
    group, distance = Workers(ef.EF21(ef.TopK(k=k))), _squared(g)
    for _ in range(-(-D // k)):
        left = _squared(group.step(g)[1] - g[0])
        assert left <= (1 - k / D) * distance * (1 + 1e-6)
        distance = left
    np.testing.assert_array_equal(group.states[0].tracked, g[0])


@pytest.mark.parametrize("compressor", CONTRACTIONS, ids=repr)
def test_ef21_plus_takes_what_is_nearer(compressor):
    """ef21.md section 2: h_i becomes b_i or m_i, whichever is nearer to g_i; m_i in a tie."""
    group, chosen = Workers(ef.EF21Plus(compressor), 3), []
    scale = np.float32([1, 1, 1, 0.01, 1, 50, 1, 1])  # so that either can win
    for t, g in enumerate(gradients(3, 8) * scale[:, None, None]):
        before = [state.tracked.copy() for state in group.states]
        messages, direction = group.step(g, t)
        for i, message in enumerate(messages):
            key, h = group.key(t, i), before[i]
            b = compressor.compress(g[i], key).decompress()
            m = h + compressor.compress(g[i] - h, key).decompress()
            off_b, off_m = _squared(b - g[i]), _squared(m - g[i])
            tracked = group.states[i].tracked
            np.testing.assert_array_equal(tracked, b if message.is_replacement else m)
            assert _squared(tracked - g[i]) <= min(off_b, off_m) + 1e-6 * _squared(g[i])
            chosen.append(message.is_replacement)
        known = group.server.tracked
        for mine, theirs in zip(group.states, known, strict=True):
            assert mine.tracked.tobytes() == theirs.tobytes()
        np.testing.assert_allclose(direction, np.mean(known, 0), atol=1e-6 * np.abs(g).max())
    assert not any(chosen[:3]), "the first step is a tie"
    assert any(chosen) == (compressor.contraction(D) < 1)
