"""EF21's options against each other and against what the papers write, equation by equation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from workers import (
    CONTRACTIONS,
    D,
    Quadratics,
    Workers,
    channels,
    gradients,
    memory,
    run_channels,
)

import ef_horovod as ef
from ef_horovod.methods.participation import participates

each_contraction = pytest.mark.parametrize("compressor", CONTRACTIONS, ids=repr)
CHOICES = {
    "momentum": (None, 0.3),
    "participation": (None, 0.6),
    "server_compressor": (None, ef.TopK(k=80)),
    "weights": (None, (0.5, 1.0, 2.0, 4.0, 3.0)),
}
COMBINATIONS = [
    dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())
]


def same_run(method, other, count=3, steps=30):
    """Require two methods to say and to do the same, to the last bit."""
    a, b = Workers(method, count), Workers(other, count)
    for t, g in enumerate(gradients(count, steps)):
        messages, direction = a.step(g, t)
        others, expected = b.step(g, t)
        assert [bytes(m) for m in messages] == [bytes(m) for m in others]
        assert direction.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "options", [{"momentum": 1.0}, {"participation": 1.0}, {"weights": (3.0,) * 4}], ids=repr
)
@each_contraction
def test_trivial_options_change_no_bit(options, compressor):
    """ef21.md section 7, items 6 and 7: SGDM with eta = 1, PP with p = 1, W with equal L_i."""
    same_run(ef.EF21(compressor, **options), ef.EF21(compressor), count=4)


@each_contraction
def test_an_aggregator_that_answers_with_everything_is_ef21(compressor):
    """ef21.md section 7, item 7: BC with C_M = I. G + (H - G) is H but for rounding."""
    plain = Workers(ef.EF21(compressor), 3)
    both = Workers(ef.EF21(compressor, server_compressor=ef.Identity()), 3)
    g = gradients(3, 30)
    expected = plain.run(g)
    np.testing.assert_allclose(both.run(g), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("compressor", [ef.TopK(k=20), ef.OneBit(), ef.RandomK(0.1)], ids=repr)
def test_weights_do_not_matter_to_homogeneous_compressors(compressor):
    """ef21.md section 7, item 6: h_i of EF21 is n w_i h_i of EF21-W."""
    plain = Workers(ef.EF21(compressor), 4)
    weighted = Workers(ef.EF21(compressor, weights=(1, 2, 4, 1)), 4)  # n w_i: powers of two
    for t, g in enumerate(gradients(4, 30)):
        expected = plain.step(g, t)[1]
        direction = weighted.step(g, t)[1]
        np.testing.assert_allclose(direction, expected, atol=1e-5 * np.abs(expected).max())
    for i, scale in enumerate((0.5, 1, 2, 0.5)):
        np.testing.assert_array_equal(plain.states[i].tracked, scale * weighted.states[i].tracked)


def reference(compressor, g, momentum, participation, server_compressor, weights, key):
    """Directions of EF21 in float64, written down from ef21.md sections 3 to 5."""
    steps, n, d = g.shape
    w = np.full(n, 1 / n) if weights is None else np.array(weights) / np.sum(weights)
    h, v, G, directions = np.zeros((n, d)), [None] * n, np.zeros(d), []

    def C(compressor, x, key):
        return compressor.compress(x.astype(np.float32), key).decompress().astype(np.float64)

    for t in range(steps):
        for i in range(n):
            if not participates(participation, key(t, i)):
                continue
            new = g[t, i] / (n * w[i])
            if momentum is not None and v[i] is not None:
                new = (1 - momentum) * v[i] + momentum * new
            v[i] = new
            h[i] += C(compressor, v[i] - h[i], key(t, i))
        H = w @ h
        if server_compressor is None:
            directions.append(H)
        else:
            G = G + C(server_compressor, H - G, key(t).of_server())
            directions.append(G)
    return np.array(directions)


@pytest.mark.parametrize("options", COMBINATIONS, ids=repr)
def test_every_combination_of_options_does_what_is_written(options):
    """EF21-SGDM, -PP, -BC, -W and all that can be made of them."""
    g, compressor = gradients(5, 30), ef.TopK(k=60)
    group = Workers(ef.EF21(compressor, **options), 5)
    expected = reference(compressor, g.astype(np.float64), key=group.key, **options)
    np.testing.assert_allclose(group.run(g), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("options", COMBINATIONS, ids=repr)
def test_every_combination_finds_frozen_gradients(options):
    """Whatever the options, the direction tends to the mean of gradients that stay."""
    g = np.repeat(gradients(5, 1), 60, axis=0)
    directions = Workers(ef.EF21(ef.TopK(k=100), **options), 5).run(g)
    mean = g[0].mean(0)
    np.testing.assert_allclose(directions[-1], mean, atol=1e-5 * np.abs(mean).max())


def test_weights_of_another_number_of_workers_are_refused():
    with pytest.raises(ef.UnsupportedError, match="got 3 weights for 4 workers, expected one for"):
        Workers(ef.EF21(ef.TopK(k=3), weights=(1, 2, 3)), 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.0}, r"got momentum=0.0, expected the weight of the new gradient in \(0"),
        ({"momentum": 1.5}, "got momentum=1.5"),
        ({"participation": 0.0}, "got participation=0.0, expected the share of workers"),
        ({"participation": 2}, "got participation=2"),
        ({"weights": (1.0, 0.0)}, r"expected a number in \(0, inf\)"),
        ({"weights": (1.0, np.nan)}, r"expected a number in \(0, inf\)"),
        ({"server_compressor": ef.RandomK(0.3, scale="unbiased")}, "expected a contraction"),
    ],
    ids=repr,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ef.EF21(ef.TopK(k=3), **options)


def test_smoothness_constants_of_numpy_are_taken_as_plain_numbers():
    """The config is compared among ranks by what it prints."""
    method = ef.EF21(ef.TopK(k=3), weights=np.array([1.0, 2.0]))
    assert method.weights == (1.0, 2.0)
    assert "weights=(1.0, 2.0)" in repr(method)
    assert hash(method) == hash(ef.EF21(ef.TopK(k=3), weights=(1, 2)))


@pytest.mark.parametrize("share", [0.1, 0.29, 0.5, 1.0])
def test_as_many_workers_take_part_as_asked_each_as_often(share):
    """ef21.md section 3: floor(p n) of them, without replacement, uniformly."""
    n, steps = 100, 400
    taken = np.array(
        [
            [participates(share, ef.Key(3, t, rank=i, workers=n)) for i in range(n)]
            for t in range(steps)
        ]
    )
    assert set(taken.sum(1)) == {round(share * n)}
    assert np.abs(taken.mean(0) - share).max() <= 5 * np.sqrt(share * (1 - share) / steps)
    assert share == 1 or len({row.tobytes() for row in taken}) > steps // 2


def test_at_least_one_worker_takes_part():
    taken = [participates(0.1, ef.Key(3, 5, rank=i, workers=4)) for i in range(4)]
    assert sum(taken) == 1


def test_a_worker_takes_part_with_all_of_its_tensors_or_none():
    for t in range(20):
        answers = {participates(0.5, ef.Key(0, t, tensor, 1, 4)) for tensor in range(30)}
        assert len(answers) == 1


def test_who_takes_part_says_nothing_about_which_entries_are_drawn():
    """RandomK's indices and the workers come from one seed, but from draws of their own."""
    n, together = 4, []
    for t in range(400):
        key = ef.Key(0, t, workers=n)
        payload = ef.RandomK(ratio=1 / n).compress(np.ones(n, np.float32), key)
        (entry,) = np.flatnonzero(payload.decompress())
        together.append(participates(1 / n, key._replace(rank=int(entry))))
    assert np.mean(together) == pytest.approx(1 / n, abs=5 * np.sqrt(0.25 * 0.75 / 400))


def test_who_does_not_take_part_is_left_as_it_was_and_sends_a_header():
    """Its bad gradient harms nobody, for nobody uses it."""
    method = ef.EF21(ef.TopK(k=30), participation=0.4, momentum=0.5)
    ranks, control = channels(method, 3), channels(method, 3)
    for t, g in enumerate(gradients(3, 12)):
        absent = [i for i in range(3) if not participates(0.4, ef.Key(1, t, 0, i, 3))]
        assert len(absent) == 2
        before = [memory(method, ranks[i].worker) for i in absent]
        sent = [channel.stats().bytes_out for channel in ranks]
        spoiled = g.copy()
        spoiled[absent] = np.nan
        directions = run_channels(ranks, spoiled, t)
        expected = run_channels(control, g, t)
        assert [x.tobytes() for x in directions] == [x.tobytes() for x in expected]
        assert [memory(method, ranks[i].worker) for i in absent] == before
        for i in absent:
            assert ranks[i].stats().bytes_out - sent[i] == 2 * 16


def test_momentum_starts_with_the_first_gradient_that_a_worker_uses():
    method = ef.EF21(ef.Identity(), momentum=0.25, participation=0.5)
    group, g = Workers(method, 2), gradients(2, 12)
    used = [[], []]
    for t in range(12):
        group.step(g[t], t)
        for i in range(2):
            if participates(0.5, group.key(t, i)):
                used[i].append(g[t, i].astype(np.float64))
    for i, state in enumerate(group.states):
        velocity = used[i][0]
        for gradient in used[i][1:]:
            velocity = 0.75 * velocity + 0.25 * gradient
        np.testing.assert_allclose(state.tracked, velocity, atol=1e-5 * np.abs(velocity).max())


@pytest.mark.parametrize("eta", [0.0, 0.9])
def test_sgd_with_momentum_on_the_direction_is_ef21_hb(eta):
    """ef21.md section 3: v = eta v + g, x -= gamma v, v^0 = g^0."""
    group, x = Workers(ef.EF21(ef.TopK(k=50)), 3), torch.zeros(D, dtype=torch.float64)
    optimizer = torch.optim.SGD([x], lr=0.125, momentum=eta)
    v, expected = np.zeros(D), np.zeros(D)
    for t, g in enumerate(gradients(3, 20)):
        direction = group.step(g, t)[1].astype(np.float64)
        x.grad = torch.from_numpy(direction)
        optimizer.step()
        v = eta * v + direction
        expected -= 0.125 * v
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_a_proximal_step_on_the_direction_solves_the_composite_problem(strength):
    """ef21.md section 3: EF21-Prox with r = strength ||x||_1, and r = 0, which is EF21."""
    problem = Quadratics.draw(spread=0.3)
    group, x, gamma = Workers(ef.EF21(ef.TopK(k=5)), 5, d=20), np.zeros(20), 0.02
    for t in range(3000):
        moved = x - gamma * group.step(problem.gradients(x).astype(np.float32), t)[1]
        x = np.sign(moved) * np.maximum(np.abs(moved) - gamma * strength, 0)
    gradient = problem.gradients(x).mean(0)
    np.testing.assert_allclose(gradient[x != 0], -strength * np.sign(x[x != 0]), atol=1e-5)
    assert np.abs(gradient).max() <= strength + 1e-5
    assert np.any(x == 0) == (strength > 0)


def test_momentum_takes_out_the_noise_that_ef21_sgd_is_left_with():
    """ef21.md section 4: the example in two dimensions, gamma = 1e-3."""
    rng = np.random.default_rng(0)
    noise = np.array([[2.0, 0.0], [0.0, 1.0], [-2.0, -1.0]])[rng.integers(3, size=8_000)]
    tails = {}
    for eta in (1.0, 0.01):
        norms = []
        ef.simulate(
            ef.EF21(ef.TopK(k=1), momentum=eta),
            lambda worker, x, t: x + noise[t],
            np.array([0.0, -0.01]),
            workers=1,
            steps=len(noise),
            step_size=1e-3,
            observe=lambda x, norms=norms: norms.append(float(x @ x)) or {},
        )
        tails[eta] = np.mean(norms[len(noise) // 2 :])
    assert tails[1.0] > 1.5e-2
    assert tails[0.01] < 4e-3
