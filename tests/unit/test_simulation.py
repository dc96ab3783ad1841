"""simulate: real payloads among workers in this process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ef_horovod as ef
from ef_horovod.exchange.gather import Gather
from ef_horovod.exchange.registry import EXCHANGES

TARGETS = np.random.default_rng(0).normal(size=(4, 30))
SOME = [
    ef.NoFeedback(ef.Identity()),
    ef.EF21(ef.Identity()),
    ef.ErrorFeedback(ef.OneBit()),
    ef.EF21(ef.TopK(k=3)),
    ef.EF21(ef.RandomK(0.2)),
    ef.ErrorFeedback(ef.RandomK(0.2, shared=False)),
]


def quadratic(worker, x, step):
    target = TARGETS[worker]
    return x - (torch.from_numpy(target).to(x.dtype) if torch.is_tensor(x) else target)


def run(method, x0=None, **changes):
    options = {"workers": 4, "steps": 400, "step_size": 0.1} | changes
    return ef.simulate(method, quadratic, np.zeros(30) if x0 is None else x0, **options)


@pytest.mark.parametrize("method", SOME, ids=repr)
def test_finds_the_minimum_of_a_sum_of_quadratics(method):
    """With a decaying step, so that 1-bit feedback, which stalls at the step's size, ends too."""
    result = run(method, step_size=lambda t: 2 / (t + 20), steps=3000)
    np.testing.assert_allclose(result.x, TARGETS.mean(0), atol=0.03)
    assert len(result.history) == 3000


@pytest.mark.parametrize("method", SOME, ids=repr)
def test_numpy_and_torch_take_the_same_steps(method):
    a = run(method, np.ones(30, np.float32), steps=40)
    b = run(method, torch.ones(30), steps=40)
    assert isinstance(b.x, torch.Tensor)
    np.testing.assert_allclose(a.x, b.x.numpy(), atol=1e-6)
    assert a.bytes_sent == b.bytes_sent


def test_a_seed_repeats_and_another_seed_does_not():
    method = ef.ErrorFeedback(ef.RandomK(0.2))
    first, again, other = (run(method, steps=20, seed=seed).x for seed in (3, 3, 4))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(30,), (5, 6), (2, 3, 5)])
@pytest.mark.parametrize("size", [0.1, np.float64(0.1), lambda t: np.float64(0.1)])
def test_x_keeps_its_shape_and_dtype_and_x0_stays(dtype, shape, size):
    x0 = np.ones(shape, dtype)
    result = ef.simulate(
        ef.EF21(ef.TopK(k=3)), lambda i, x, t: x, x0, workers=2, steps=3, step_size=size
    )
    assert result.x.shape == shape
    assert result.x.dtype == dtype
    assert np.all(x0 == 1)
    assert not np.all(result.x == 1)


def test_bytes_of_a_gather_and_of_a_sum():
    compressor = ef.TopK(k=3)
    result = run(ef.EF21(compressor), steps=7)
    assert result.bytes_sent == 7 * 3 * compressor.nbytes(30)
    assert [entry["bytes_sent"] for entry in result.history] == [
        (t + 1) * 3 * compressor.nbytes(30) for t in range(7)
    ]
    ring = 2 * 3 * (4 * 30) // 4  # 2 (n - 1) / n of the float32 values
    assert run(ef.NoFeedback(ef.Identity()), steps=7).bytes_sent == 7 * ring
    assert run(ef.EF21(ef.TopK(k=3)), steps=7, workers=1).bytes_sent == 0


def test_gather_and_sum_agree():
    method = ef.ErrorFeedback(ef.RandomK(0.3))
    a, b = (run(method, exchange=exchange, steps=50) for exchange in ("gather", "reduce"))
    np.testing.assert_allclose(a.x, b.x, atol=1e-5)
    assert a.bytes_sent > b.bytes_sent


def test_observations_go_to_the_history():
    result = run(SOME[1], steps=3, observe=lambda x: {"norm": float(np.linalg.norm(x))})
    assert [entry["step"] for entry in result.history] == [0, 1, 2]
    assert result.history[-1]["norm"] == float(np.linalg.norm(result.x))


def test_states_are_returned():
    result = run(ef.EF21(ef.TopK(k=3)), steps=300)
    for state, target in zip(result.states, TARGETS, strict=True):
        np.testing.assert_allclose(state.tracked, result.x - target, atol=0.05)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_gradient_names_worker_and_step(bad):
    def gradient(worker, x, step):
        return x + (bad if (worker, step) == (2, 5) else 1.0)

    with pytest.raises(ef.NonFiniteError, match="worker 2, step 5"):
        ef.simulate(SOME[3], gradient, np.zeros(9), workers=4, steps=9, step_size=0.1)


def test_wrong_arguments_are_refused():
    with pytest.raises(ef.UnsupportedError, match=r"write for example EF21\(TopK"):
        run(ef.TopK(k=3))
    with pytest.raises(ValueError, match=r"has shape \(2,\), expected \(3,\)"):
        ef.simulate(SOME[1], lambda i, x, t: x[:2], np.zeros(3), workers=1, steps=1, step_size=0.1)
    with pytest.raises(ValueError, match="at least 1"):
        run(SOME[1], workers=0)
    with pytest.raises(TypeError, match="NumPy array, a torch or a TensorFlow tensor"):
        run(SOME[1], x0=[0.0] * 30)


def test_divergence_is_a_non_finite_error_for_linear_methods_too() -> None:
    """Finite messages can have an infinite sum; nobody asked to drop a step then."""
    huge = np.full(3, 3e38, np.float32)
    with pytest.raises(ef.NonFiniteError, match=r"step 0: .* lower step_size"):
        ef.simulate(
            ef.NoFeedback(ef.Identity()),
            lambda worker, x, step: huge,
            np.zeros(3, np.float32),
            workers=2,
            steps=1,
            step_size=0.1,
        )


def test_a_network_in_the_name_is_refused():
    with pytest.raises(ef.UnsupportedError, match="got exchange='auto:1gbit', expected one w"):
        run(SOME[3], exchange="auto:1gbit")


class Opening(Gather):
    """A gather whose channels are its own, so that each worker receives and reduces by itself."""

    def open(self, *args, **options):
        return super().open(*args, **options)


class Hasty(Gather):
    """A gather that waits where it should only start."""

    def start(self, *args, **options):
        received = super().start(*args, **options)()
        return lambda: received


def test_workers_that_receive_together_end_where_those_do_that_receive_alone(monkeypatch):
    monkeypatch.setitem(EXCHANGES, "opening", Opening())
    method = ef.DoubleSqueeze(ef.TopK(k=3), server_compressor=ef.TopK(k=5))
    together, alone = (run(method, exchange=kind, steps=9) for kind in ("gather", "opening"))
    assert alone.x.tobytes() == together.x.tobytes()
    assert alone.history == together.history
    for one, other in zip(alone.states, together.states, strict=True):
        assert one.error.tobytes() == other.error.tobytes()


def test_an_exchange_that_waits_at_once_is_refused_at_once(monkeypatch):
    """All workers are in one thread: it would wait for itself."""
    monkeypatch.setitem(EXCHANGES, "hasty", Hasty())
    said = (
        r"rank 0 waits in 'allgather.x' for ranks \[1, 2, 3\] of the same thread, expected no wait"
    )
    with pytest.raises(ef.UnsupportedError, match=said):
        run(SOME[3], exchange="hasty", name="x")


def test_a_server_gets_one_message_and_gives_one_answer_for_each_worker():
    up, down = ef.TopK(k=3), ef.OneBit()
    options = {"steps": 7, "exchange": "server"}
    squeezed = run(ef.DoubleSqueeze(up, server_compressor=down), **options)
    assert squeezed.bytes_sent == 7 * up.nbytes(30)
    assert squeezed.bytes_received == 7 * down.nbytes(30)
    assert [entry["bytes_received"] for entry in squeezed.history] == [
        (t + 1) * down.nbytes(30) for t in range(7)
    ]
    whole = run(ef.EF21(up), **options)
    assert (whole.bytes_sent, whole.bytes_received) == (7 * up.nbytes(30), 7 * 4 * 30)


@pytest.mark.parametrize(
    "method",
    [
        *SOME,
        ef.DoubleSqueeze(ef.TopK(k=3), server_compressor=ef.RandomK(0.2)),
        ef.ErrorCompensatedX(ef.OneBit(), server_compressor=ef.TopK(k=3)),
        ef.EF21(
            ef.TopK(k=3), participation=0.5, server_compressor=ef.TopK(k=9), weights=(1, 2, 3, 4)
        ),
        ef.EF21Plus(ef.TopK(k=3)),
        ef.NoFeedback(ef.Identity(), server_compressor=ef.OneBit()),
    ],
    ids=repr,
)
def test_the_exchange_changes_what_is_counted_and_nothing_else(method):
    server, gather = (run(method, steps=30, exchange=kind) for kind in ("server", "gather"))
    assert server.x.tobytes() == gather.x.tobytes()
    if method.fixed_size:
        assert gather.bytes_sent == gather.bytes_received == 3 * server.bytes_sent


def test_who_does_not_take_part_sends_a_header():
    method = ef.EF21(ef.TopK(k=3), participation=0.5)
    sent = run(method, steps=10, exchange="server").bytes_sent
    assert sent == 10 * (ef.TopK(k=3).nbytes(30) + 16) // 2


@pytest.mark.parametrize("lr", [0.125, ef.Decay(0.5, initial=0.25)], ids=repr)
def test_the_learning_rate_may_be_a_decay_and_go_inside(lr):
    """ErrorFeedback(step_inside=): x moves by exactly what was decoded of lr g + e."""
    feedback = ef.ErrorFeedback(ef.TopK(k=3), step_inside=lr)
    result = run(feedback, np.zeros(30, np.float32), step_size=lr, steps=50)
    x, errors = np.zeros(30), np.zeros((4, 30))
    for t in range(50):
        p = ef.methods.schedules.value_at(lr, t) * (x - TARGETS) + errors
        q = [ef.TopK(k=3).compress(row.astype(np.float32)).decompress() for row in p]
        errors, x = p - q, x - np.mean(q, 0)
    np.testing.assert_allclose(result.x, x, atol=1e-5)
    by_function = run(feedback, np.zeros(30, np.float32), step_size=lr_of(lr), steps=50)
    assert result.x.tobytes() == by_function.x.tobytes()


def lr_of(schedule):
    return lambda t: ef.methods.schedules.value_at(schedule, t)


def test_an_answer_that_overflows_is_a_non_finite_error() -> None:
    """Finite messages whose sum the aggregator cannot compress."""
    huge = np.full(3, 3e38, np.float32)
    with pytest.raises(ef.NonFiniteError, match=r"step 0: .* lower step_size"):
        ef.simulate(
            ef.DoubleSqueeze(ef.TopK(k=3), server_compressor=ef.TopK(k=1)),
            lambda worker, x, step: huge,
            np.zeros(3, np.float32),
            workers=2,
            steps=1,
            step_size=0.1,
        )


def test_a_scalar_is_simulated():
    run = ef.simulate(
        ef.EF21(ef.TopK(k=1)), lambda i, x, t: np.asarray(x - 1.0), np.array(0.0),
        workers=2, steps=50, step_size=0.3,
    )  # fmt: skip
    assert run.x.shape == ()
    assert abs(run.x - 1.0) < 1e-6


def test_observe_may_return_nothing_but_not_the_keys_of_the_history():
    def run(observe):
        return ef.simulate(
            ef.EF21(ef.TopK(k=1)), lambda i, x, t: x, np.ones(2),
            workers=1, steps=1, step_size=0.1, observe=observe,
        )  # fmt: skip

    assert run(lambda x: None).history[0]["step"] == 0
    with pytest.raises(ef.UnsupportedError, match="from observe, expected None or a dict"):
        run(lambda x: {"step": 99})
