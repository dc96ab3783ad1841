"""Invariants of the error-feedback methods, for every registered method and compressor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ef_horovod as ef
from ef_horovod import exchange, registry
from ef_horovod.channel import Channel, finish_step
from ef_horovod.compressors.base import Payload
from ef_horovod.transports.local import local_group

D = 500
COMPRESSORS = [example for cls in registry.COMPRESSORS.values() for example in cls.examples()]
METHODS = [m for cls in registry.METHODS.values() for c in COMPRESSORS for m in cls.examples(c)]
EF21S = [method for method in METHODS if isinstance(method, ef.EF21)]
each_method = pytest.mark.parametrize("method", METHODS, ids=repr)
each_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
# What these decode to is exact in float32 while the numbers are integers: sums have no rounding.
EXACT = [
    ef.EF21(compressor, **options)
    for compressor in (ef.Identity(), ef.TopK(ratio=0.1), ef.TopK(k=3), ef.RandomK(0.2))
    for options in ({}, {"momentum": 1.0}, {"momentum": 0.5})
]


class Workers:
    """`count` workers with one aggregator, as a gather exchange runs them."""

    def __init__(self, method, count=1, framework=np.zeros):
        self.method, self.count = method, count
        inits = [method.init(framework(D)) for _ in range(count)]
        self.states, self.server = [worker for worker, _ in inits], inits[0][1]

    def step(self, gradients, t=0):
        """Messages and the direction (a copy) after a step from one gradient for each worker."""
        own = [g.copy() if isinstance(g, np.ndarray) else g.clone() for g in gradients]
        pushed = [
            self.method.push(state, g, ef.Key(1, t, 0, i))
            for i, (state, g) in enumerate(zip(self.states, own, strict=True))
        ]
        messages = [message for message, _ in pushed]
        aggregate, self.server = self.method.reduce(
            self.server, messages, ef.Key(1, t, 0, 0, self.count).of_server()
        )
        pulled = [self.method.pull(state, aggregate) for _, state in pushed]
        self.states = [state for _, state in pulled]
        return messages, pulled[0][0] * 1


def float32_zeros(d):
    return np.zeros(d, np.float32)


def gradients(workers, steps, *, integers=False, seed=0):
    """float32[steps, workers, D]: correlated over steps, as gradients are."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(1, workers, D)) * np.exp(rng.normal(size=D))
    g = base + 0.5 * rng.normal(size=(steps, workers, D))
    return np.rint(8 * g).astype(np.float32) if integers else g.astype(np.float32)


def host(x):
    return x.numpy() if isinstance(x, torch.Tensor) else x


def memory(state):
    """A copy of the vectors that a state remembers, by name, without scratch."""
    return {
        name: host(value).copy()
        for name, value in state._asdict().items()
        if hasattr(value, "shape") and name != "next_velocity"
    }


def assert_same_memory(a, b):
    a, b = memory(a), memory(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), f"{name} differs"


def test_registry_gives_methods_for_all_compressors():
    assert {type(m).__name__ for m in METHODS} >= {"NoFeedback", "ErrorFeedback", "EF21"}
    assert len(METHODS) >= 2 * len(COMPRESSORS)
    assert len(EF21S) >= 10


@each_compressor
def test_error_feedback_loses_nothing(compressor):
    """sum(sent) + error == sum(gradients)."""
    if compressor.contraction(D) is None:
        with pytest.raises(ValueError, match="whose error can be larger"):
            ef.ErrorFeedback(compressor)
        return
    workers = Workers(ef.ErrorFeedback(compressor), framework=float32_zeros)
    sent, total = np.zeros(D), np.zeros(D)
    for t, g in enumerate(gradients(1, 60)):
        messages, direction = workers.step(g, t)
        np.testing.assert_array_equal(direction, messages[0].decompress())
        sent += messages[0].decompress()
        total += g[0]
        error = workers.states[0].error
        size = np.abs(total) + np.abs(error) + np.abs(sent)
        np.testing.assert_array_less(np.abs(sent + error - total), 1e-5 * size + 1e-4)


@pytest.mark.parametrize("compressor", [ef.TopK(k=7), ef.RandomK(0.1), ef.Identity()], ids=repr)
def test_error_feedback_loses_no_bit_of_integers(compressor):
    workers = Workers(ef.ErrorFeedback(compressor), framework=float32_zeros)
    sent, total = np.zeros(D), np.zeros(D)
    for t, g in enumerate(gradients(1, 100, integers=True)):
        sent += workers.step(g, t)[1]
        total += g[0]
        np.testing.assert_array_equal(sent + workers.states[0].error, total)


@each_compressor
def test_no_feedback_is_the_mean_of_messages(compressor):
    workers = Workers(ef.NoFeedback(compressor), 3, float32_zeros)
    for t, g in enumerate(gradients(3, 5)):
        direction = workers.step(g, t)[1]
        sent = [compressor.compress(g[i], ef.Key(1, t, 0, i)).decompress() for i in range(3)]
        size = np.abs(sent).max()
        np.testing.assert_allclose(direction, np.mean(sent, 0, np.float64), atol=1e-6 * size)


@pytest.mark.parametrize("name", sorted(registry.METHODS))
def test_identity_is_gradient_descent(name):
    """With integers, for which h + (g - h) has no rounding, to the last bit."""
    for method in registry.METHODS[name].examples(ef.Identity()):
        if getattr(method, "momentum", None) is not None:
            continue  # an average of gradients on purpose
        workers = Workers(method, 4, float32_zeros)
        for g in gradients(4, 30, integers=True):
            np.testing.assert_array_equal(workers.step(g)[1], g.mean(0))


def test_ef21_with_identity_minimises_as_gradient_descent_does():
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
    group = Workers(method, workers, float32_zeros)
    steps = 12 if method.momentum == 0.5 else 60  # a halving a step: dyadic, until bits run out
    for t, g in enumerate(gradients(workers, steps, integers=True)):
        direction = group.step(g, t)[1]
        total = np.sum([state.tracked for state in group.states], axis=0, dtype=np.float64)
        np.testing.assert_array_equal(group.server.total, total)
        np.testing.assert_array_equal(direction, total.astype(np.float32) / np.float32(workers))


@pytest.mark.parametrize("method", EF21S, ids=repr)
def test_mean_of_tracked_gradients_stays_within_rounding(method):
    group = Workers(method, 3, float32_zeros)
    for t, g in enumerate(gradients(3, 300)):
        direction = group.step(g, t)[1]
    mean = np.mean([state.tracked for state in group.states], axis=0, dtype=np.float64)
    np.testing.assert_allclose(direction, mean, atol=1e-4 * np.abs(mean).max())


@pytest.mark.parametrize("method", EF21S, ids=repr)
def test_tracked_gradient_is_what_receivers_decode(method):
    """A rank adds to its own h_i what the others decode from its bytes, to the last bit."""
    group, believed = Workers(method, 1, float32_zeros), float32_zeros(D)
    for t, g in enumerate(gradients(1, 50)):
        (message,), _ = group.step(g, t)
        Payload.from_bytes(bytes(message)).add_to(believed)
        assert believed.tobytes() == group.states[0].tracked.tobytes()


def test_ef21_with_a_fixed_mask_is_error_feedback():
    """Richtarik et al. 2021, Theorem 1: additive, homogeneous compressors make them equal."""
    mask, g = ef.RandomK(0.3), gradients(3, 40)
    a, b = (Workers(m(mask), 3, float32_zeros) for m in (ef.ErrorFeedback, ef.EF21))
    x, y = np.zeros(D), np.zeros(D)
    for t in range(40):
        # The same key at every step keeps the same entries; gradients follow the iterates.
        x -= 0.1 * a.step([g[t, i] + x.astype(np.float32) for i in range(3)], 0)[1]
        y -= 0.1 * b.step([g[t, i] + y.astype(np.float32) for i in range(3)], 0)[1]
        on_mask = x != 0
        assert 0 < on_mask.sum() == int(0.3 * D)
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(x).max())


@each_compressor
def test_ef21_with_momentum_one_is_ef21(compressor):
    methods = registry.METHODS["EF21"].examples(compressor)
    if compressor.contraction(D) is None:
        assert methods == ()
        return
    plain = Workers(ef.EF21(compressor), 2, float32_zeros)
    averaged = Workers(ef.EF21(compressor, momentum=1.0), 2, float32_zeros)
    for t, g in enumerate(gradients(2, 30)):
        messages, direction = plain.step(g, t)
        others, other = averaged.step(g, t)
        assert [bytes(m) for m in messages] == [bytes(m) for m in others]
        np.testing.assert_array_equal(direction, other)


def test_ef21_momentum_averages_gradients():
    method, g = ef.EF21(ef.Identity(), momentum=0.25), gradients(1, 6)
    group, velocity = Workers(method, 1, float32_zeros), g[0, 0].astype(np.float64)
    group.step(g[0])
    for t in range(1, 6):
        direction = group.step(g[t])[1]
        velocity = 0.75 * velocity + 0.25 * g[t, 0]
        np.testing.assert_allclose(direction, velocity, atol=1e-5 * np.abs(velocity).max())


@pytest.mark.parametrize("k", [1, 50, 499])
def test_ef21_with_top_k_finds_a_frozen_gradient_after_d_over_k_steps(k):
    g = gradients(1, 1)[0]
    group, distance = Workers(ef.EF21(ef.TopK(k=k)), 1, float32_zeros), float(np.sum(g**2))
    for _ in range(-(-D // k)):
        left = np.sum((group.step(g)[1] - g[0]) ** 2, dtype=np.float64)
        assert left <= (1 - k / D) * distance * (1 + 1e-6)
        distance = left
    np.testing.assert_array_equal(group.states[0].tracked, g[0])


@pytest.mark.parametrize("method", EF21S, ids=repr)
def test_ef21_tracks_one_step_as_the_lemma_says(method):
    """||g + C(h' - g) - h'||^2 <= (1 - theta) ||g - h||^2 + beta ||h' - h||^2."""
    if method.momentum is not None or isinstance(method.compressor, ef.RandomK):
        assert method in EF21S[1:]  # the lemma is about other vectors, or holds on average
        return
    delta = method.compressor.contraction(D)
    theta = 1 - np.sqrt(1 - delta)
    beta = (1 - delta) / theta
    group, g = Workers(method, 1, float32_zeros), gradients(1, 30).astype(np.float64)
    before = np.sum((group.states[0].tracked - g[0, 0]) ** 2)
    for t in range(1, 30):
        group.step(g[t].astype(np.float32), t)
        after = np.sum((group.states[0].tracked - g[t, 0]) ** 2)
        moved = np.sum((g[t, 0] - g[t - 1, 0]) ** 2)
        assert after <= (1 - theta) * before + beta * moved + 1e-6 * np.sum(g[t, 0] ** 2)
        before = after


@each_method
@pytest.mark.parametrize("bad", [None, np.nan, np.inf], ids=str)
def test_a_dropped_step_leaves_no_trace(method, bad):
    """A push that is thrown away, or that refuses its gradient, and then goes on as if not."""
    kept, control = Workers(method, 1, float32_zeros), Workers(method, 1, float32_zeros)
    for t, g in enumerate(gradients(1, 8)):
        spoiled = 100 * g[0, ::-1].copy()
        spoiled[::7] = spoiled[::7] if bad is None else bad
        before = memory(kept.states[0])
        if bad is None:
            method.push(kept.states[0], spoiled, ef.Key(1, t))
        else:
            with pytest.raises(ef.NonFiniteError):
                method.push(kept.states[0], spoiled, ef.Key(1, t))
        after = memory(kept.states[0])
        assert all(before[name].tobytes() == after[name].tobytes() for name in before)
        messages, direction = kept.step(g, t)
        others, other = control.step(g, t)
        assert bytes(messages[0]) == bytes(others[0])
        assert direction.tobytes() == other.tobytes()
        assert_same_memory(kept.states[0], control.states[0])


@each_method
def test_numpy_and_torch_states_stay_equal_to_the_last_bit(method):
    numpy_group = Workers(method, 2, float32_zeros)
    torch_group = Workers(method, 2, torch.zeros)
    for t, g in enumerate(gradients(2, 50)):
        messages, direction = numpy_group.step(g, t)
        others, other = torch_group.step([torch.from_numpy(part) for part in g], t)
        assert [bytes(m) for m in messages] == [bytes(m) for m in others]
        assert direction.tobytes() == other.numpy().tobytes()
    for a, b in zip(numpy_group.states, torch_group.states, strict=True):
        assert_same_memory(a, b)
    assert_same_memory(numpy_group.server, torch_group.server)


def channels(method, count, like=None, exchange="auto"):
    like = float32_zeros(D) if like is None else like
    return [
        Channel("weights", like, method, transport, exchange=exchange, seed=1)
        for transport in local_group(count, timeout=5)
    ]


def run_channels(group, gradients, step):
    """One step of all ranks in this thread; their directions, copied, or None if dropped."""
    for channel, g in zip(group, gradients, strict=True):
        channel.gradient[:] = torch.from_numpy(g) if torch.is_tensor(channel.gradient) else g
        channel.start(step)
    finished = [finish_step([channel]) for channel in group]
    return [None if parts is None else host(parts[0]).copy() for parts in finished]


@each_method
@pytest.mark.parametrize("framework", [float32_zeros, torch.zeros], ids=["numpy", "torch"])
def test_channels_take_the_steps_that_the_method_takes(method, framework):
    """Catches a channel that hands out memory which a state still needs."""
    ranks, reference = channels(method, 3, framework(D)), Workers(method, 3, float32_zeros)
    for t, g in enumerate(gradients(3, 12)):
        directions = run_channels(ranks, g, t)
        expected = step_as_channels_do(reference, g, t)
        size = np.abs(expected).max()
        for direction in directions:
            assert direction.tobytes() == directions[0].tobytes()
            np.testing.assert_allclose(direction, expected, atol=1e-5 * size)
    if ranks[0].exchange == "gather":
        for channel, state in zip(ranks, reference.states, strict=True):
            assert_same_memory(channel.worker, state)


def step_as_channels_do(workers, gradients, t):
    """A step with the key that a channel named "weights" draws from."""
    from ef_horovod.keys import tensor_id

    pushed = [
        workers.method.push(state, g.copy(), ef.Key(1, t, tensor_id("weights"), i))
        for i, (state, g) in enumerate(zip(workers.states, gradients, strict=True))
    ]
    messages = [message for message, _ in pushed]
    aggregate, workers.server = workers.method.reduce(
        workers.server, messages, ef.Key(1, t, tensor_id("weights"), 0, workers.count).of_server()
    )
    pulled = [workers.method.pull(state, aggregate) for _, state in pushed]
    workers.states = [state for _, state in pulled]
    return pulled[0][0].copy()


@each_method
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_a_bad_gradient_on_one_rank_drops_the_step_on_all(method, bad):
    ranks, control = channels(method, 3), channels(method, 3)
    for t, g in enumerate(gradients(3, 6)):
        if t in (0, 3):
            spoiled = g.copy()
            spoiled[t % 2, D // 2] = bad
            assert run_channels(ranks, spoiled, t) == [None] * 3
        directions = run_channels(ranks, g, t)
        for direction, expected in zip(directions, run_channels(control, g, t), strict=True):
            assert direction.tobytes() == expected.tobytes()
    assert [channel.stats().skipped for channel in ranks] == [2, 2, 2]
    assert [channel.stats().steps for channel in ranks] == [6, 6, 6]
    for channel, other in zip(ranks, control, strict=True):
        if channel.worker is not None:
            assert_same_memory(channel.worker, other.worker)


@each_method
def test_gather_and_reduce_give_the_same_direction(method):
    if not method.compressor.linear:
        with pytest.raises(ef.UnsupportedError, match="use exchange='gather' or 'auto'"):
            exchange.choose("reduce", method)
        return
    gathered, reduced = (
        channels(method, 3, exchange="gather"),
        channels(method, 3, exchange="reduce"),
    )
    for t, g in enumerate(gradients(3, 10)):
        for a, b in zip(run_channels(gathered, g, t), run_channels(reduced, g, t), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())
