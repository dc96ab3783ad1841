"""ErrorCompensatedX (Tang et al., NeurIPS 2021): the errors of two steps cancel, those of one not.

u is the same average without compression, Dl = delta + mean_i delta_i.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from workers import CONTRACTIONS, Workers, gradients

import ef_horovod as ef
from ef_horovod.methods.schedules import value_at

ECX, D = ef.ErrorCompensatedX, 30
ALPHAS = [0.1, 0.5, ef.Decay(1), ef.Decay(2 / 3), 1.0]
MILD = [ef.TopK(ratio=0.5), ef.OneBit()]  # section 6: stable without a filter


def averages(alpha, directions):
    """The recursion v = (1 - alpha_t) v + alpha_t a_t, float64[steps, d]."""
    v, out = 0.0, []
    for t, a in enumerate(directions):
        now = value_at(alpha, t)
        v = (1 - now) * v + now * np.asarray(a, np.float64)
        out.append(v)
    return np.array(out)


def run(method, g, field):
    """Directions and Dl_t, both float64[steps, d]; `field` names the errors in the states."""
    group = Workers(method, g.shape[1], d=g.shape[2])
    directions, errors = [], []
    for t in range(len(g)):
        directions.append(group.step(g[t], t)[1].astype(np.float64))
        errors.append(getattr(group.server, field) + group.mean(field))
    return np.array(directions), np.array(errors)


def deviation(alpha, directions, errors, u):
    """By how much v_t = u_t + alpha_{t-1} Dl_{t-1} - alpha_t Dl_t fails, relative to its terms."""
    weighted = np.array([value_at(alpha, t) * e for t, e in enumerate(errors)])
    before = np.vstack([np.zeros(errors.shape[1]), weighted[:-1]])
    off = np.abs(directions - (u + before - weighted)).max()
    return off / max(np.abs(directions).max(), np.abs(errors).max())


@pytest.mark.parametrize("alpha", ALPHAS, ids=repr)
@pytest.mark.parametrize("compressor", MILD, ids=repr)
def test_errors_telescope(alpha, compressor):
    """ecx.md section 5, item 1."""
    g = gradients(5, 60, d=D)
    method = ECX(compressor, server_compressor=compressor, alpha=alpha, beta=1.0)
    directions, errors = run(method, g, "last")
    u = averages(alpha, g.mean(1, np.float64))
    assert deviation(alpha, directions, errors, u) < 1e-5
    assert np.abs(errors).max() > 0.1


@pytest.mark.parametrize("alpha", ALPHAS, ids=repr)
def test_the_iterate_is_one_error_away_from_the_uncompressed_one(alpha):
    """ecx.md section 5, item 2: sum v = sum u - alpha_t Dl_t."""
    g = gradients(5, 60, d=D)
    directions, errors = run(
        ECX(MILD[0], server_compressor=MILD[0], alpha=alpha, beta=1.0), g, "last"
    )
    off = (directions - averages(alpha, g.mean(1, np.float64))).sum(0)
    np.testing.assert_allclose(off, -value_at(alpha, 59) * errors[-1], atol=1e-4)


def test_the_error_of_one_step_does_not_telescope():
    """ecx.md section 5, item 3: plain feedback leaves a moving average of all past errors."""
    alpha, g = 0.1, gradients(5, 60, d=D)
    answers, errors = run(ef.DoubleSqueeze(MILD[0], server_compressor=MILD[0]), g, "error")
    directions, u = averages(alpha, answers), averages(alpha, g.mean(1, np.float64))
    assert deviation(alpha, directions, errors, u) > 0.01
    weights = alpha * (1 - alpha) ** np.arange(60)[::-1]
    np.testing.assert_allclose((directions - u).sum(0), -(weights @ errors), atol=1e-4)


def test_a_filter_breaks_exactness():
    """ecx.md section 5, item 4."""
    alpha, g = 0.5, gradients(5, 60, d=D)
    u = averages(alpha, g.mean(1, np.float64))
    off = {
        beta: deviation(
            alpha,
            *run(ECX(MILD[0], server_compressor=MILD[0], alpha=alpha, beta=beta), g, "last"),
            u,
        )
        for beta in (1.0, 0.3)
    }
    assert off[1.0] < 1e-5 < 0.01 < off[0.3]


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("compressor", MILD, ids=repr)
def test_one_filter_makes_of_it_the_error_of_one_step(compressor, alpha):
    """beta = 1 / (2 - alpha): e_t = delta_{t-1}."""
    g = gradients(5, 60, d=D)
    method = ECX(compressor, server_compressor=compressor, alpha=alpha, beta=1 / (2 - alpha))
    directions, _ = run(method, g, "last")
    answers, _ = run(ef.DoubleSqueeze(compressor, server_compressor=compressor), g, "error")
    plain = averages(alpha, answers)
    np.testing.assert_allclose(directions, plain, atol=1e-5 * np.abs(plain).max())
    other, _ = run(replace(method, beta=0.3), g, "last")
    assert np.abs(other - plain).max() > 0.01 * np.abs(plain).max()


@pytest.mark.parametrize("compressor", CONTRACTIONS, ids=repr)
def test_without_averaging_it_is_doublesqueeze_to_the_last_bit(compressor):
    """ecx.md section 5, item 5."""
    ecx = Workers(ECX(compressor, server_compressor=compressor, alpha=1.0, beta=1.0), 3)
    double = Workers(ef.DoubleSqueeze(compressor, server_compressor=compressor), 3)
    for t, g in enumerate(gradients(3, 30)):
        messages, direction = ecx.step(g, t)
        others, expected = double.step(g, t)
        assert [bytes(m) for m in messages] == [bytes(m) for m in others]
        np.testing.assert_array_equal(direction, expected)
        np.testing.assert_array_equal(ecx.server.last, double.server.error)


@pytest.mark.parametrize("alpha", ALPHAS, ids=repr)
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_identity_is_the_uncompressed_method(alpha, beta):
    """ecx.md section 5, item 6."""
    g = gradients(5, 40, d=D)
    directions, errors = run(ECX(ef.Identity(), alpha=alpha, beta=beta), g, "last")
    u = averages(alpha, g.mean(1, np.float64))
    np.testing.assert_allclose(directions, u, atol=1e-5 * np.abs(u).max())
    assert not np.any(errors)


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("alpha", [0.5, ef.Decay(2 / 3)], ids=repr)
def test_the_recursion_is_what_is_written(alpha, beta):
    """ecx.md sections 3 and 4 in float64, on one worker whose messages are not compressed again."""
    compressor, g = ef.TopK(k=15), gradients(1, 30, d=D)
    group = Workers(ECX(compressor, alpha=alpha, beta=beta), d=D)
    delta, e, v = [np.zeros(D), np.zeros(D)], np.zeros(D), np.zeros(D)
    for t in range(30):
        now, one, two = (value_at(alpha, max(t - back, 0)) for back in range(3))
        Delta = one / now * (2 - now) * delta[0] - two / now * (1 - now) * delta[1]
        e = (1 - beta) * e + beta * Delta
        w = g[t, 0] + e
        q = compressor.compress(w.astype(np.float32)).decompress()
        delta = [w - q, delta[0]]
        v = (1 - now) * v + now * q
        direction = group.step(g[t], t)[1]
        np.testing.assert_allclose(direction, v, atol=1e-4 * np.abs(v).max())
        np.testing.assert_allclose(group.states[0].last, delta[0], atol=1e-4 * np.abs(w).max())


def test_a_filter_keeps_weak_compressors_stable():
    """ecx.md section 6: Top 10 %, alpha = 0.1, a fixed mean and noise."""
    rng = np.random.default_rng(0)
    g = (rng.normal(size=1000) + rng.normal(size=(400, 1, 1000))).astype(np.float32)
    size = np.linalg.norm(g[0, 0])
    for beta, stable in ((1.0, False), (0.3, True), (0.1, True)):
        group = Workers(ECX(ef.TopK(ratio=0.1), alpha=0.1, beta=beta), d=1000)
        for t in range(400 if stable else 100):
            group.step(g[t], t)
        error = np.linalg.norm(group.states[0].last) / size
        assert (error < 6) == stable
        assert stable or error > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, r"got alpha=0.0, expected a weight in \(0, 1\]"),
        ({"alpha": ef.Decay(1, initial=2)}, "got alpha=Decay"),
        ({"beta": 1.5}, "got beta=1.5"),
    ],
    ids=repr,
)
def test_weights_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ECX(ef.TopK(k=3), **options)
