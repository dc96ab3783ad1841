"""The step of EF21-BC and the inequality that it rests on."""

from __future__ import annotations

import numpy as np
import pytest

import ef_horovod as ef
from ef_horovod import theory

N, D = 5, 40


def test_it_is_the_step_of_ef21_if_one_way_is_uncompressed():
    constants = theory.Smoothness(2.0, [1.0, 4.0])
    for alpha in (0.01, 0.3, 1.0):
        expected = theory.ef21_step(constants, alpha)
        assert theory.ef21_bc_step(constants, alpha, 1.0) == pytest.approx(expected, rel=1e-12)
        assert theory.ef21_bc_step(constants, 1.0, alpha) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("up", "down"), [(4, 4), (4, 20), (20, 4), (40, 4)])
def test_the_direction_strays_no_further_than_the_iterates_move(up, down):
    """||G - grad f|| <= c L_QM ||x^{t+1} - x^t|| as sequences, from a start where both are 0."""
    rng = np.random.default_rng(up + down)
    curvature = np.exp(rng.normal(size=(N, D)))  # f_i = curvature_i x^2 / 2: grad f_i(0) = 0
    constants = theory.Smoothness(curvature.mean(0).max(), curvature.max(1))
    method = ef.EF21(ef.TopK(k=up), server_compressor=ef.TopK(k=down))
    states = [method.init(np.zeros(D, np.float32), N)[0] for _ in range(N)]
    server, x, strayed, moved = method.init(np.zeros(D, np.float32), N)[1], np.zeros(D), 0.0, 0.0
    for t in range(200):
        step = rng.normal(size=D) * (t % 20 == 0)  # a jump, then time to catch up
        x, keys = x + step, [ef.Key(0, t, 0, i, N) for i in range(N)]
        pushed = [
            method.push(states[i], (curvature[i] * x).astype(np.float32), keys[i]) for i in range(N)
        ]
        aggregate, server = method.reduce(server, [m for m, _ in pushed], keys[0].of_server())
        pulled = [method.pull(state, aggregate) for _, state in pushed]
        states = [state for _, state in pulled]
        strayed += float(np.sum((pulled[0][0] - curvature.mean(0) * x) ** 2))
        moved += float(np.sum(step**2))
    c = 1 / theory.ef21_bc_step(constants, up / D, down / D) - constants.L
    assert 0 < strayed <= c**2 * moved


@pytest.mark.parametrize("alphas", [(0.0, 0.5), (0.5, 0.0), (1.5, 0.5), (0.5, 1.5)])
def test_contractions_out_of_range_are_refused(alphas):
    with pytest.raises(ValueError, match=r"expected a number in \(0, 1\]"):
        theory.ef21_bc_step(theory.Smoothness(1.0, [1.0]), *alphas)
