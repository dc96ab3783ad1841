"""Step sizes: identities, limits, published examples and the inequalities behind them."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ef_horovod as ef
from ef_horovod import theory

alphas = st.floats(1e-9, 1.0)
constants_lists = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30)


def beta(alpha):
    """Of the EF21 paper: how much a moved gradient adds to the error."""
    return (1 - alpha) / theory.theta(alpha)


def smoothness(each):
    return theory.Smoothness(float(np.mean(each)), each)


def test_theory_is_loaded_when_it_is_first_used():
    code = """if True:
        import sys, ef_horovod
        assert "ef_horovod.theory" not in sys.modules
        assert ef_horovod.theory.xi(1.0) == 0
        assert {"scipy", "torch", "numba"}.isdisjoint(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@given(alpha=alphas)
def test_xi_is_the_root_of_beta_over_theta_and_both_closed_forms(alpha):
    xi = theory.xi(alpha)
    assert math.isclose(xi, math.sqrt(beta(alpha) / theory.theta(alpha)), rel_tol=1e-12)
    assert math.isclose(xi, (1 + math.sqrt(1 - alpha)) / alpha - 1, rel_tol=1e-12, abs_tol=1e-12)
    assert math.isclose(theory.theta(alpha), 1 - math.sqrt(1 - alpha), abs_tol=1e-15)


@given(alpha=st.floats(1e-6, 0.999))
def test_the_form_with_s_of_the_reference_code_is_the_same(alpha):
    s = math.sqrt(1 / (1 - alpha)) - 1
    assert math.isclose(theory.theta(alpha), 1 - (1 - alpha) * (1 + s), rel_tol=1e-8)
    assert math.isclose(beta(alpha), (1 - alpha) * (1 + 1 / s), rel_tol=1e-8)


def test_without_compression_all_are_gradient_descent():
    assert (theory.theta(1.0), beta(1.0), theory.xi(1.0)) == (1.0, 0.0, 0.0)
    constants = theory.Smoothness(2.0, [1.0, 5.0])
    for step in (theory.ef21_step, theory.ef21_am_step, theory.ef21_w_step):
        assert step(constants, 1.0) == 0.5
        assert math.isclose(step(constants, 1 - 1e-12), 0.5, rel_tol=1e-5)
    assert theory.ef21_pp_step(constants, 1.0, 1.0) == 0.5
    assert theory.ef21_w_pp_step(constants, 1.0, 1.0) == 0.5
    assert math.isclose(theory.xi(1e-9), 2e9, rel_tol=1e-8)


@given(each=constants_lists, alpha=alphas, mu=st.floats(1e-3, 1e3))
def test_the_arithmetic_mean_never_allows_less(each, alpha, mu):
    constants = smoothness(each)
    slack = 1 + 1e-12
    ratio = constants.L_AM / constants.L_QM
    assert ratio <= slack
    am, qm = theory.ef21_am_step(constants, alpha), theory.ef21_step(constants, alpha)
    assert am * slack >= qm
    am_pl = theory.ef21_am_pl_step(constants, alpha, mu)
    assert am_pl * slack >= theory.ef21_pl_step(constants, alpha, mu)
    assert am_pl <= min(am, theory.theta(alpha) / (2 * mu)) * slack
    assert theory.ef21_w_step(constants, alpha) == am


def test_pl_steps_by_hand():
    """alpha = 3/4 has xi = 1 and theta = 1/2, and L_i = 1, 7 have L_AM = 4 and L_QM = 5."""
    constants = theory.Smoothness(2.0, [1.0, 7.0])
    assert theory.ef21_step(constants, 0.75) == pytest.approx(1 / 7)
    assert theory.ef21_am_step(constants, 0.75) == pytest.approx(1 / 6)
    qm, am = 1 / (2 + math.sqrt(2) * 5), 1 / (2 + math.sqrt(2) * 4)
    assert theory.ef21_pl_step(constants, 0.75, mu=0.1) == pytest.approx(qm)
    assert theory.ef21_am_pl_step(constants, 0.75, mu=0.1) == pytest.approx(am)
    assert theory.ef21_pl_step(constants, 0.75, mu=10.0) == pytest.approx(0.025)


@given(each=constants_lists, a=alphas, b=alphas)
def test_less_loss_allows_longer_steps(each, a, b):
    constants = smoothness(each)
    low, high = sorted((a, b))
    assert theory.ef21_step(constants, low) <= theory.ef21_step(constants, high)


@given(each=constants_lists)
def test_variance_is_the_difference_of_the_squared_means(each):
    constants = smoothness(each)
    difference = constants.L_QM**2 - constants.L_AM**2
    assert math.isclose(constants.L_var, difference, rel_tol=1e-9, abs_tol=1e-9 * max(each) ** 2)
    assert math.isclose(constants.weights.sum(), 1.0, rel_tol=1e-12)


@given(each=constants_lists, seed=st.integers(0, 99))
def test_jensen_with_the_weights_that_give_the_arithmetic_mean(each, seed):
    """||mean a_i||^2 <= sum ||a_i||^2 / (n^2 w_i), which becomes L_AM^2 for ||a_i|| = L_i."""
    constants = smoothness(each)
    n, w = constants.n, constants.weights
    assert math.isclose(np.sum(np.square(each) / (n**2 * w)), constants.L_AM**2, rel_tol=1e-10)
    a = np.random.default_rng(seed).normal(size=(n, 5))
    bound = np.sum(np.sum(a**2, axis=1) / (n**2 * w))
    assert np.sum(a.mean(0) ** 2) <= bound * (1 + 1e-12)


@given(alpha=st.floats(1e-6, 1.0), p=st.floats(1e-3, 1.0))
def test_the_best_partial_participation_is_ef21_with_p_alpha(alpha, p):
    constants = theory.Smoothness(2.0, [1.0, 4.0])
    if p * alpha == 1:
        return
    s = theory.pp_best_s(alpha, p)
    best = theory.ef21_pp_step(constants, alpha, p, s=s, rho=s)
    assert math.isclose(best, theory.ef21_step(constants, p * alpha), rel_tol=1e-6)
    for factor in (0.9, 0.99, 1.01):
        try:
            other = theory.ef21_pp_step(constants, alpha, p, s=factor * s, rho=factor * s)
        except ValueError:  # theta_p <= 0
            continue
        assert other <= best * (1 + 1e-9)


def test_partial_participation_by_hand():
    """theta = 0.499, beta = 500.5, theta_p = 0.24925 and B = 750.75 L_QM^2."""
    constants = theory.Smoothness(1.0, [3.0, 4.0, 5.0])
    root = math.sqrt(750.75 / 0.24925)
    assert math.isclose(
        theory.ef21_pp_step(constants, 0.5, 0.5), 1 / (1 + math.sqrt(50 / 3) * root), rel_tol=1e-12
    )
    assert math.isclose(
        theory.ef21_w_pp_step(constants, 0.5, 0.5), 1 / (1 + 4 * root), rel_tol=1e-12
    )


@given(seed=st.integers(0, 50), d=st.integers(2, 12))
def test_one_step_lemma(seed, d):
    """||g + C(h' - g) - h'||^2 <= (1 - theta) ||g - h||^2 + beta ||h' - h||^2 for Top-k."""
    rng = np.random.default_rng(seed)
    g, h, h_next = rng.normal(size=(3, d)) * rng.exponential(size=(3, d))
    compressor = ef.TopK(k=1)
    alpha = compressor.contraction(d)
    new = g + compressor.compress(h_next - g).decompress()
    left = np.sum((new - h_next) ** 2)
    right = (1 - theory.theta(alpha)) * np.sum((g - h) ** 2)
    right += beta(alpha) * np.sum((h_next - h) ** 2)
    assert left <= right + 1e-9


@pytest.mark.parametrize("weighted", [False, True])
@given(n=st.integers(1, 8), d=st.integers(1, 8), seed=st.integers(0, 99))
def test_rare_features_inequalities(weighted, n, d, seed):
    rng = np.random.default_rng(seed)
    owned = rng.random((n, d)) < 0.4
    owned[0, 0] = True
    each = rng.exponential(size=n) + 0.01
    a = rng.normal(size=(n, d)) * owned
    mean = np.sum(a.mean(0) ** 2)
    c, r, W = theory.rare_features(owned, each if weighted else None)
    if weighted:
        w = each / each.sum()
        assert mean <= W * np.sum(np.sum(a**2, 1) / (n**2 * w)) * (1 + 1e-12)
    else:
        assert math.isclose(W, c / n)
        assert mean <= c / n * np.mean(np.sum(a**2, 1)) * (1 + 1e-12)
    assert 1 <= c <= n
    assert 1 <= r <= d
    assert 0 < W <= 1


def test_rare_features_steps():
    owned = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]], bool)
    constants = theory.Smoothness(2.0, [1.0, 2.0, 5.0])
    c, r, W = theory.rare_features(owned, constants.L_i)
    assert (c, r, W) == (2, 2, 5 / 8)  # the third worker alone outweighs the first two
    xi = theory.xi(1 / r)
    assert theory.rare_features_step(constants, 1 / r, c) == pytest.approx(
        1 / (2 + math.sqrt(2 / 3) * math.sqrt(10) * xi)
    )
    assert theory.rare_features_w_step(constants, 1 / r, W) == pytest.approx(
        1 / (2 + math.sqrt(5 / 8) * (8 / 3) * xi)
    )
    full = theory.rare_features(np.ones((3, 4), bool), constants.L_i)
    assert full == (3, 4, 1.0)
    assert theory.rare_features_w_step(constants, 0.5, full.W) == theory.ef21_am_step(
        constants, 0.5
    )
    assert theory.rare_features_step(constants, 0.5, full.c) == theory.ef21_step(constants, 0.5)


def test_supports_ignore_stored_zeros():
    shards = [np.array([[0.0, 1.0], [0.0, -1.0]]), np.array([[2.0, 0.0]])]
    assert theory.supports(shards).tolist() == [[False, True], [True, False]]


CONSTANTS = theory.Smoothness(1.0, [1.0, 2.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.theta(0.0), r"got alpha=0.0, expected a number in \(0, 1\]"),
        (lambda: theory.xi(math.nan), "got alpha=nan"),
        (lambda: theory.ef21_pl_step(CONSTANTS, 0.5, 0.0), "got mu=0.0"),
        (lambda: theory.ef21_pp_step(CONSTANTS, 0.5, 0.0), "got p=0.0"),
        (lambda: theory.ef21_pp_step(CONSTANTS, 0.5, 0.5, s=0), "got s=0 and rho=0.001"),
        (
            lambda: theory.ef21_pp_step(CONSTANTS, 1e-4, 0.5),
            "expected a positive one; take s = rho",
        ),
        (lambda: theory.rare_features_step(CONSTANTS, 0.5, 3), "got c=3 for 2 workers"),
        (lambda: theory.rare_features_w_step(CONSTANTS, 0.5, 0), "got W=0"),
        (lambda: theory.Smoothness(1.0, []), "0 L_i from None to None"),
        (lambda: theory.Smoothness(1.0, [1.0, 0.0]), "2 L_i from 0.0 to 1.0"),
        (lambda: theory.Smoothness(math.inf, [1.0]), "L=inf"),
        (lambda: theory.rare_features(np.zeros((2, 2))), "with 0 entries"),
        (lambda: theory.rare_features(np.ones((2, 2)), [1.0]), r"shape \(1,\) for 2 workers"),
        (lambda: theory.supports([np.ones((1, 2)), np.ones((1, 3))]), "the same d"),
        (lambda: theory.supports([]), "got 0 arrays"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
