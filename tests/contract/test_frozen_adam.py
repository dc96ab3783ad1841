"""FrozenAdam against torch's Adam, and against 1-bit Adam's recursion in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from workers import CONTRACTIONS, D, channels, float32_zeros, gradients, run_channels

import ef_horovod as ef
from ef_horovod.testing.tools import array_of, host

N = 6  # dense steps
each_exchange = pytest.mark.parametrize("exchange", ["auto", "gather", "double_pass"])
each_framework = pytest.mark.parametrize("framework", ["numpy", "torch", "tensorflow"])
SPARSE = ef.Then(ef.TopK(k=7), ef.OneBit())


def run(group, g, start=0):
    """float32[steps, d]: the aggregated gradients, the same on all ranks."""
    directions = []
    for t, own in enumerate(g, start):
        each = [np.array(host(one)) for one in run_channels(group, own, t)]
        assert len({one.tobytes() for one in each}) == 1
        directions.append(each[0])
    return np.array(directions)


def field(channel, name):
    """float32[d]: a vector of a worker's state, over all pieces."""
    return np.concatenate([host(getattr(p.channel.worker, name)) for p in channel.pieces()])


def adam(g, frozen_after):
    """float64[steps, d]: updates of Adam on averaged gradients; v stops after some steps."""
    m, v, updates = np.zeros(D), np.zeros(D), []
    for t, own in enumerate(g, 1):
        mean = own.astype(np.float64).mean(0)
        m = 0.9 * m + 0.1 * mean
        if t <= frozen_after:
            v = 0.999 * v + 0.001 * mean**2
        root = np.sqrt(v / (1 - 0.999 ** min(t, frozen_after)))
        updates.append(m / (1 - 0.9**t) / (root + 1e-8))
    return np.array(updates)


@each_exchange
@each_framework
def test_the_dense_steps_are_adam_of_pytorch(framework, exchange):
    like = array_of(framework, float32_zeros(D))
    group = channels(ef.FrozenAdam(SPARSE), 3, like, exchange=exchange, dense_steps=30)
    g = gradients(3, 30)
    found = run(group, g)
    x = torch.zeros(D, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=1.0)
    for t, own in enumerate(g):
        before = x.detach().clone()
        x.grad = torch.from_numpy(own.mean(0))
        optimizer.step()
        np.testing.assert_allclose(found[t], before - x.detach(), rtol=1e-3, atol=2e-5)
    assert not any(field(channel, "error").any() for channel in group)


def test_weight_decay_of_sgd_is_that_of_adamw():
    g = gradients(3, 20)
    updates = run(channels(ef.FrozenAdam(SPARSE), 3, dense_steps=20), g)
    x, y = (torch.nn.Parameter(torch.ones(D)) for _ in range(2))
    expected = torch.optim.AdamW([x], lr=0.1, weight_decay=0.3)
    ours = torch.optim.SGD([y], lr=0.1, weight_decay=0.3)
    for t, own in enumerate(g):
        x.grad, y.grad = torch.from_numpy(own.mean(0)), torch.from_numpy(updates[t])
        expected.step()
        ours.step()
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@each_exchange
@pytest.mark.parametrize("precondition", [False, True])
def test_without_compression_only_the_second_moment_stops(precondition, exchange):
    method = ef.FrozenAdam(ef.Identity(), precondition=precondition, floor=0)
    g = gradients(3, 20)
    found = run(channels(method, 3, exchange=exchange, dense_steps=N), g)
    np.testing.assert_allclose(found, adam(g, N), rtol=1e-3, atol=1e-4)
    with pytest.raises(AssertionError):  # it does stop
        np.testing.assert_allclose(found, adam(g, 20), rtol=1e-3, atol=1e-4)


def test_uncompressed_parameters_have_adam_throughout():
    g = gradients(3, 20)
    found = run(channels(ef.FrozenAdam(SPARSE).uncompressed(), 3), g)
    np.testing.assert_allclose(found, adam(g, 20), rtol=1e-3, atol=1e-4)


@each_exchange
@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("compressor", [*CONTRACTIONS, SPARSE], ids=repr)
def test_nothing_is_lost_and_all_ranks_hold_the_same_moments(compressor, precondition, exchange):
    """m' + mean e' = b1 m + (1 - b1) mean g + mean e, in units of what is compressed."""
    method = ef.FrozenAdam(compressor, precondition=precondition)
    group, g = channels(method, 3, exchange=exchange, dense_steps=N), gradients(3, N + 15)
    run(group, g[:N])
    root = 1.0
    if precondition:
        parts = [host(p.channel.worker.second) for p in group[0].pieces()]
        roots = [np.maximum(np.sqrt(v), method.floor * np.sqrt(v.max())) for v in parts]
        root = np.concatenate(roots) + 1e-8
    for t in range(N, N + 15):
        weight = 0.1 / (1 - 0.9 ** (t + 1))
        kept = (1 - weight) * field(group[0], "momentum") / root
        kept = kept + np.mean([field(channel, "error") for channel in group], 0)
        second = field(group[0], "second")
        run(group, g[t : t + 1], t)
        after = field(group[0], "momentum") / root
        after = after + np.mean([field(channel, "error") for channel in group], 0)
        scale = np.abs(kept).max() + np.abs(g[t]).max()
        np.testing.assert_allclose(
            after, kept + weight * g[t].mean(0) / root, rtol=1e-4, atol=1e-5 * scale / np.min(root)
        )
        assert field(group[0], "second").tobytes() == second.tobytes()
        for name in ("momentum", "second"):
            assert len({field(channel, name).tobytes() for channel in group}) == 1


def test_a_sparsifier_sends_what_moves_parameters_most():
    """One part has gradients 30 times as large; with `precondition` both parts are sent."""
    g = gradients(2, 60)
    g[:, :, : D // 2] *= 30
    moved = {}
    for precondition in (None, False):
        method = ef.FrozenAdam(ef.TopK(k=7), precondition=precondition)
        found = run(channels(method, 2, dense_steps=N), g)[N:]
        moved[precondition] = (found[:, D // 2 :] != 0).mean()
    assert moved[False] == 0
    assert moved[None] > 0.02


@pytest.mark.parametrize("compressor", [ef.OneBit(), ef.TopK(k=7)], ids=repr)
def test_an_entry_that_is_first_seen_later_takes_no_large_step(compressor):
    """Not even where the floor is 0: its root is the largest one."""
    g = gradients(2, 40)
    g[:N, :, 0] = 0
    found = run(channels(ef.FrozenAdam(compressor, floor=0), 2, dense_steps=N), g)
    largest = np.sqrt((g[:N].mean(1) ** 2).mean(0).max())
    assert np.abs(found[N:, 0]).max() <= 40 * np.abs(g).max() / largest


@each_exchange
def test_a_vector_that_is_first_seen_later_is_refused_on_all_ranks(exchange):
    g = gradients(2, N + 3)
    g[: N + 2] = 0
    group = channels(ef.FrozenAdam(SPARSE), 2, exchange=exchange, dense_steps=N)
    assert not run(group, g[: N + 2]).any()
    with pytest.raises(ef.UnsupportedError, match="got the first gradient of a bucket after the"):
        run(group, g[N + 2 :], N + 2)


def test_clipping_is_that_of_each_workers_gradient():
    g = gradients(4, 12)
    norms = np.linalg.norm(g, axis=2, keepdims=True)
    clipped = (g * np.minimum(1, 0.5 / norms)).astype(np.float32)
    ours = run(channels(ef.FrozenAdam(ef.TopK(k=7), clip=1.0), 4, dense_steps=N), g)
    byhand = run(channels(ef.FrozenAdam(ef.TopK(k=7)), 4, dense_steps=N), clipped)
    np.testing.assert_allclose(ours, byhand, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta1": 1.0}, "FrozenAdam got beta1=1.0"),
        ({"beta2": -0.1}, "FrozenAdam got beta2=-0.1"),
        ({"eps": 0}, "FrozenAdam got eps=0"),
        ({"floor": 2}, "FrozenAdam got floor=2"),
        ({"precondition": "yes"}, "FrozenAdam got precondition='yes'"),
        ({"clip": 0}, "FrozenAdam got clip=0"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises((ValueError, TypeError), match=said):
        ef.FrozenAdam(ef.OneBit(), **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "with dense_steps=0, expected some dense steps"),
        ({"exchange": "server"}, "with dense_steps=0, expected some dense steps"),
        ({"exchange": "server", "dense_steps": 2}, "got dense_steps=2 with exchange='server'"),
    ],
)
def test_without_dense_steps_it_is_refused_so_by_servers_too(options, said):
    method, x = ef.FrozenAdam(SPARSE), float32_zeros(4)
    with pytest.raises(ef.UnsupportedError, match=said):
        ef.simulate(method, lambda i, x, t: x, x, workers=2, steps=1, step_size=0.1, **options)
