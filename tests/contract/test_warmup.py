"""Dense warm-up: the first steps are uncompressed, then compression starts as in a new run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from workers import D, channels, float32_zeros, gradients, memory, run_channels

import ef_horovod as ef
from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.dense import UNCOMPRESSED
from ef_horovod.methods.registry import METHODS
from ef_horovod.testing.tools import array_of
from ef_horovod.training.choice import decide
from ef_horovod.transports.local import local_group

N = 5
PLAIN = [
    ef.ErrorFeedback(ef.TopK(k=7)),
    ef.EF21(ef.OneBit(), momentum=0.3),
    ef.EF21(ef.TopK(k=7), server_compressor=ef.TopK(k=9)),
    ef.DoubleSqueeze(ef.OneBit(), server_compressor=ef.OneBit()),
    ef.ErrorFeedback(ef.HardThreshold(1.0)),
    ef.NoFeedback(ef.RandomK(0.1, scale="unbiased")),
    ef.PowerSGD(rank=2),
]
EACH_METHOD = [
    method
    for kind in METHODS.values()
    for method in kind.examples(ef.TopK(k=7))
    if getattr(method, "participation", None) is None  # who sits out sends no NaN
]
each_exchange = pytest.mark.parametrize("exchange", ["auto", "gather", "double_pass"])


def states_of(channel):
    return [
        memory(channel.method, state)
        for piece in channel.pieces()
        for state in (piece.channel.worker, piece.channel.server)
        if state is not None
    ]


def run(group, g, start=0):
    """float32[steps, d]: the aggregated gradients, the same on all ranks."""
    directions = []
    for t, own in enumerate(g, start):
        each = run_channels(group, own, t)
        assert len({one.tobytes() for one in each}) == 1
        directions.append(each[0])
    return np.array(directions)


@pytest.mark.parametrize("framework", ["numpy", "torch", "tensorflow"])
@each_exchange
@pytest.mark.parametrize("method", PLAIN, ids=repr)
def test_averages_first_then_as_from_the_start(method, exchange, framework):
    """As a run whose first step is N; without the steps before it."""
    if exchange == "double_pass" and not method.sliceable:
        return
    like = array_of(framework, float32_zeros(D))
    warm, cold = (
        channels(method, 3, like, exchange=exchange, dense_steps=steps) for steps in (N, 0)
    )
    g = gradients(3, 12)
    dense = run(warm, g[:N])
    np.testing.assert_allclose(dense, g[:N].mean(1), rtol=1e-5, atol=1e-6)
    fresh = states_of(channels(method, 3, like, exchange=exchange)[0])
    assert states_of(warm[0]) == fresh
    assert run(warm, g[N:], N).tobytes() == run(cold, g[N:], N).tobytes()
    assert [states_of(one) for one in warm] == [states_of(one) for one in cold]


@pytest.mark.parametrize("nesterov", [False, True])
@each_exchange
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_momentum_correction_goes_on_with_its_velocity(framework, exchange, nesterov):
    """Momentum SGD in the dense steps; without masking and with all entries also later."""
    method = ef.MomentumCorrection(ef.TopK(ratio=1.0), 0.9, nesterov, masking=False)
    like = array_of(framework, float32_zeros(D))
    group = channels(method, 3, like, exchange=exchange, dense_steps=N)
    g = gradients(3, 20)
    found = run(group, g)
    x = torch.zeros(D, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=1.0, momentum=0.9, nesterov=nesterov)
    for t, own in enumerate(g):
        before = x.detach().clone()
        x.grad = torch.from_numpy(own.mean(0))
        optimizer.step()
        np.testing.assert_allclose(found[t], before - x.detach(), rtol=1e-3, atol=1e-4)


@each_exchange
def test_each_worker_has_its_own_velocity_and_nothing_unsent_at_the_switch(exchange):
    method = ef.MomentumCorrection(ef.TopK(k=7), 0.5, clip=3.0)
    group, g = channels(method, 3, exchange=exchange, dense_steps=N), gradients(3, N)
    run(group, g)
    alone = channels(method.uncompressed(), 3, exchange=exchange)
    run(alone, g)
    assert [states_of(one) for one in group] == [states_of(one) for one in alone]
    for channel in group:
        velocity = np.concatenate([p.channel.worker.velocity for p in channel.pieces()])
        unsent = np.concatenate([p.channel.worker.accumulation for p in channel.pieces()])
        assert velocity.any()
        assert not unsent.any()


@pytest.mark.parametrize("method", EACH_METHOD, ids=repr)
def test_the_method_of_the_dense_steps_works_on_the_states(method):
    """With undone and dropped steps in both phases: as if they had not been."""
    group, calm = (channels(method, 2, dense_steps=3) for _ in range(2))
    g = gradients(2, 6)
    spoiled = g.copy()
    spoiled[:, 1, 5] = np.nan
    for t in range(6):
        run_channels(group, 3 * g[t], t, undoable=True)
        assert all(channel.undoable for channel in group)
        for channel in group:
            channel.undo()
        assert run_channels(group, spoiled[t], t, undoable=True) == [None, None]
        found, expected = run_channels(group, g[t], t), run_channels(calm, g[t], t)
        assert [one.tobytes() for one in found] == [one.tobytes() for one in expected]
        assert [states_of(one) for one in group] == [states_of(one) for one in calm]
    assert group[0].stats().steps == 6
    assert group[0].stats().skipped == 12


def test_stats_count_what_was_sent():
    method = ef.ErrorFeedback(ef.TopK(k=7))
    group, g = channels(method, 3, dense_steps=N), gradients(3, 12)
    run(group, g[:N])
    dense = group[0].stats()
    assert dense.bytes_out == dense.dense_bytes_out == N * (2 * 2 * 4 * D // 3)
    assert np.isnan(dense.relative_error)
    before = dense.bytes_out
    run(group, g[N:], N)
    stats = group[0].stats()
    assert stats.bytes_out - before == 7 * 2 * method.compressor.nbytes(D)
    assert stats.steps == 12
    assert 0 < stats.relative_error < 1
    assert stats.exchange == "gather"


def test_a_run_resumed_from_the_state_goes_on_in_either_phase():
    method, g = ef.MomentumCorrection(ef.TopK(k=7)), gradients(2, 12)
    for stop in (3, 8):
        whole, again = (channels(method, 2, dense_steps=N) for _ in range(2))
        run(whole, g[:stop])
        for old, new in zip(whole, again, strict=True):
            for half in ("accumulation", "velocity"):
                ours, theirs = (getattr(c.pieces()[0].channel.worker, half) for c in (old, new))
                theirs[:] = ours
        assert run(whole, g[stop:], stop).tobytes() == run(again, g[stop:], stop).tobytes()


def test_forget_starts_from_zero_in_the_same_phase():
    method, g = ef.MomentumCorrection(ef.TopK(k=7)), gradients(2, 12)
    group, fresh = (channels(method, 2, dense_steps=N) for _ in range(2))
    run(group, g[:3])
    for channel in group:
        channel.forget()
    assert run(group, g[3:], 3).tobytes() == run(fresh, g[3:], 3).tobytes()


@pytest.mark.parametrize("exchange", ["auto", "double_pass"])
def test_simulate_has_the_same_steps(exchange):
    g = gradients(3, 12)
    method = ef.MomentumCorrection(ef.TopK(k=7))
    found = ef.simulate(
        method,
        lambda i, x, t: g[t, i],
        float32_zeros(D),
        workers=3,
        steps=12,
        step_size=1.0,
        seed=1,
        name="weights",
        exchange=exchange,
        dense_steps=N,
    )
    group = channels(method, 3, exchange=exchange, dense_steps=N)
    x = float32_zeros(D)
    for direction in run(group, g):
        x = x - 1.0 * direction
    assert found.x.tobytes() == x.tobytes()
    assert found.bytes_sent == sum(c.stats().bytes_out for c in group) // 3


def test_what_is_not_compressed_needs_no_warm_up():
    (end,) = local_group(1)
    for method in (UNCOMPRESSED, ef.MomentumCorrection(ef.Identity())):
        assert decide("auto", method, D, end, 5).warm_up() is None
    assert decide("auto", None, D, end, 5).warm_up() is None
    assert decide("auto", PLAIN[0], D, end, 0).warm_up() is None


def simulate(**options):
    x = float32_zeros(4)
    ef.simulate(PLAIN[0], lambda i, x, t: x, x, workers=2, steps=1, step_size=0.1, **options)


def test_servers_are_refused():
    with pytest.raises(UnsupportedError, match="got dense_steps=3 with exchange='server', expect"):
        simulate(exchange="server", dense_steps=3)


@pytest.mark.parametrize("steps", [-1, 1.5, True, None])
def test_a_number_of_steps_is_a_whole_number(steps):
    with pytest.raises(ValueError, match=r"got dense_steps=.*expected .*; 0 compresses from the"):
        simulate(dense_steps=steps)


@pytest.mark.parametrize("method", [PLAIN[0], ef.MomentumCorrection(ef.TopK(k=7))], ids=repr)
@each_exchange
def test_norms_are_those_of_the_channel_in_use(method, exchange):
    """A dense step loses nothing; the gradient's norm is its own. Only where it was asked for."""
    group, g = channels(method, 3, exchange=exchange, dense_steps=N), gradients(3, 12)
    for t, own in enumerate(g):
        for channel in group:
            channel.measure([(0, 100), (100, D)] if t in (3, 8) else [])
        run_channels(group, own, t)
        for channel, mine in zip(group, own, strict=True):
            assert channel.counters.steps == t + 1
            if t not in (3, 8):
                assert channel.measured() == []
                continue
            (lost, first), (_, second) = channel.measured()
            assert (lost > 0) is (t >= N)
            for norm, part in ((first, mine[:100]), (second, mine[100:])):
                assert norm == pytest.approx(np.square(part.astype(float)).sum(), rel=1e-5)
