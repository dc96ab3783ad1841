"""What every method keeps, with every compressor that it takes; see methods/base.py."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from workers import (
    COMPRESSORS,
    METHODS,
    D,
    Workers,
    channels,
    float32_zeros,
    gradients,
    memory,
    run_channels,
)

import ef_horovod as ef
from ef_horovod import exchange, registry
from ef_horovod.buckets import one_slot, plan_buckets
from ef_horovod.channel import Channel
from ef_horovod.memories import load_memories, save_memories
from ef_horovod.methods.participation import participates

each_method = pytest.mark.parametrize("method", METHODS, ids=repr)


class OneChannel(NamedTuple):
    """A bucket of one parameter, or of several."""

    channel: Channel
    slots: list


def sender(method, t):
    """A rank of three that takes part in step t: any one, unless the method draws some."""
    share = getattr(method, "participation", None)
    ranks = [rank for rank in range(3) if participates(share, ef.Key(1, t, 0, rank, 3))]
    return ranks[t % len(ranks)]


def test_registry_gives_methods_for_all_compressors():
    assert {type(method).__name__ for method in METHODS} == set(registry.METHODS)
    assert len(registry.METHODS) >= 7
    for compressor in COMPRESSORS:
        assert any(method.compressor == compressor for method in METHODS)


@each_method
@pytest.mark.parametrize("bad", [None, np.nan, np.inf], ids=str)
def test_a_dropped_push_leaves_no_trace(method, bad):
    """A push that is thrown away, or that refuses its gradient, and then goes on as if not."""
    kept, control = Workers(method), Workers(method)
    for t, g in enumerate(gradients(1, 8)):
        spoiled = 100 * g[0, ::-1].copy()
        spoiled[::7] = spoiled[::7] if bad is None else bad
        before = memory(method, kept.states[0])
        if bad is None:
            method.push(kept.states[0], spoiled, kept.key(t))
        else:
            with pytest.raises(ef.NonFiniteError):
                method.push(kept.states[0], spoiled, kept.key(t))
        assert memory(method, kept.states[0]) == before
        messages, direction = kept.step(g, t)
        others, other = control.step(g, t)
        assert bytes(messages[0]) == bytes(others[0])
        assert direction.tobytes() == other.tobytes()
        assert memory(method, kept.states[0]) == memory(method, control.states[0])
        assert memory(method, kept.server) == memory(method, control.server)


@pytest.mark.parametrize(
    "method", [method for method in METHODS if method.compressor == ef.TopK(k=3)], ids=repr
)
def test_push_leaves_in_the_gradient_what_compression_lost(method):
    """Seen by a channel's statistics: top-k keeps at least its share of what was compressed."""
    (channel,) = channels(method, 1)
    errors = []
    for t, g in enumerate(gradients(1, 9)):
        run_channels([channel], g, t)
        errors.append(channel.stats().relative_error)
    assert max(errors) <= np.sqrt(1 - 3 / D) + 1e-6
    assert np.median(errors) > 0.1


@each_method
def test_messages_are_as_long_as_the_method_says(method):
    group, lengths = Workers(method, 3), set()
    for t, g in enumerate(gradients(3, 8)):
        messages, _ = group.step(g, t)
        sizes = {message.nbytes for message in messages}
        lengths |= sizes
        if method.sized:
            assert sizes == {method.skip(g[0], group.key(t)).nbytes}
    assert all(bytes(message)[:1] == b"\xef" for message in messages)
    if method.sized:
        assert method.compressor.nbytes(D) in lengths
    else:
        assert len(lengths) > 1, "sized is False, yet all messages are equally long"


@each_method
def test_numpy_and_torch_states_stay_equal_to_the_last_bit(method):
    numpy_group, torch_group = Workers(method, 2), Workers(method, 2, torch.zeros)
    for t, g in enumerate(gradients(2, 50)):
        messages, direction = numpy_group.step(g, t)
        others, other = torch_group.step([torch.from_numpy(part) for part in g], t)
        assert [bytes(m) for m in messages] == [bytes(m) for m in others]
        assert direction.tobytes() == other.tobytes()
    for a, b in zip(numpy_group.states, torch_group.states, strict=True):
        assert memory(method, a) == memory(method, b)
    assert memory(method, numpy_group.server) == memory(method, torch_group.server)


@each_method
@pytest.mark.parametrize("framework", [float32_zeros, torch.zeros], ids=["numpy", "torch"])
def test_channels_take_the_steps_that_the_method_takes(method, framework):
    """Catches a channel that hands out memory which a state still needs."""
    ranks, reference = channels(method, 3, framework(D)), Workers(method, 3, name="weights")
    bits = ranks[0].exchange == "gather"
    for t, g in enumerate(gradients(3, 12)):
        directions = run_channels(ranks, g, t)
        _, expected = reference.step(g, t)
        for direction in directions:
            assert direction.tobytes() == directions[0].tobytes()
            if bits:
                assert direction.tobytes() == expected.tobytes()
            else:  # sums in flight are rounded in another order
                np.testing.assert_allclose(direction, expected, atol=1e-5 * np.abs(expected).max())
    if bits:
        for channel, state in zip(ranks, reference.states, strict=True):
            assert memory(method, channel.worker) == memory(method, state)
            assert memory(method, channel.server) == memory(method, reference.server)


@each_method
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_a_bad_gradient_on_one_rank_drops_the_step_on_all(method, bad):
    ranks, control = channels(method, 3), channels(method, 3)
    for t, g in enumerate(gradients(3, 8)):
        if t in (0, 3, 6):  # in step 6 some methods reset
            spoiled = g.copy()
            spoiled[sender(method, t), D // 2] = bad
            assert run_channels(ranks, spoiled, t) == [None] * 3
        directions = run_channels(ranks, g, t)
        for direction, expected in zip(directions, run_channels(control, g, t), strict=True):
            assert direction.tobytes() == expected.tobytes()
    assert [channel.stats().skipped for channel in ranks] == [3, 3, 3]
    assert [channel.stats().steps for channel in ranks] == [8, 8, 8]
    for channel, other in zip(ranks, control, strict=True):
        if channel.worker is not None:
            assert memory(method, channel.worker) == memory(method, other.worker)


@each_method
def test_gather_and_reduce_give_the_same_direction(method):
    if not method.summable:
        with pytest.raises(ef.UnsupportedError, match="use exchange='gather' or 'auto'"):
            exchange.choose("reduce", method)
        return
    gathered = channels(method, 3, exchange="gather")
    reduced = channels(method, 3, exchange="reduce")
    for t, g in enumerate(gradients(3, 10)):
        for a, b in zip(run_channels(gathered, g, t), run_channels(reduced, g, t), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())


@each_method
def test_a_run_from_a_checkpoint_goes_on_as_the_uninterrupted_one(method):
    """Through the state dict, into channels that have been somewhere else."""
    whole, resumed = channels(method, 2), channels(method, 2)
    halves = [("a", 0, 200), ("b", 200, D)]
    slots = [one_slot(name, float32_zeros(stop - start))[0] for name, start, stop in halves]
    slots = [slot._replace(start=h[1], stop=h[2]) for slot, h in zip(slots, halves, strict=True)]
    g = gradients(2, 14)
    for t in range(5):
        run_channels(whole, g[t], t)
        run_channels(resumed, g[t, ::-1], t)
    for source, target in zip(whole, resumed, strict=True):
        saved = save_memories([OneChannel(source, slots)])
        load_memories([OneChannel(target, slots)], saved)
    for t in range(5, 14):
        directions = run_channels(whole, g[t], t)
        for direction, other in zip(directions, run_channels(resumed, g[t], t), strict=True):
            assert direction.tobytes() == other.tobytes()


def test_a_checkpoint_holds_each_workers_vectors_and_no_scratch():
    (channel,) = channels(ef.EF21Plus(ef.TopK(k=3)), 1)
    run_channels([channel], gradients(1, 1)[0], 0)
    saved = save_memories([OneChannel(channel, one_slot("w", float32_zeros(D)))])
    assert saved["w"].keys() == {"worker.tracked", "server.tracked.0"}
    assert np.count_nonzero(saved["w"]["server.tracked.0"]) == 3


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (ef.EF21(ef.TopK(k=3)), None),
        (ef.ErrorFeedback(ef.TopK(k=3)), None),
        (ef.DoubleSqueeze(ef.TopK(k=3)), None),
        (ef.PerturbedCompressedSGD(ef.TopK(k=3)), None),
        (
            ef.PerturbedCompressedSGD(ef.TopK(k=3), noise=0.1, reset_every=2),
            ef.PerturbedCompressedSGD(ef.Identity(), noise=0.1),
        ),
        (
            ef.ErrorCompensatedX(ef.TopK(k=3), down=ef.TopK(k=5), alpha=0.25),
            ef.ErrorCompensatedX(ef.Identity(), alpha=0.25, beta=1.0),
        ),
    ],
    ids=repr,
)
def test_parameters_that_stay_dense_are_treated_alike(method, expected):
    """Averaging and noise are no compression: small parameters need them too."""
    plans = plan_buckets(
        [("w", float32_zeros(50)), ("b", float32_zeros(5))],
        method,
        dense=lambda name, _: name == "b",
        bucket_bytes=1 << 20,
        device_of=lambda _: None,
    )
    assert [plan.method for plan in plans] == [expected, method]
