"""Compressors whose settings follow a schedule, in methods and exchanges."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from workers import D, Workers, channels, float32_zeros, gradients, memory, run_channels

import ef_horovod as ef
from ef_horovod.server.plan import BucketSpec
from ef_horovod.server.rounds import longest_message
from ef_horovod.testing.tools import array_of

WARM_UP = ef.Exponential(0.5, 0.01, steps=8)
TOP = ef.TopK(ratio=WARM_UP)
METHODS = [
    ef.ErrorFeedback(TOP),
    ef.EF21(TOP, momentum=0.3),
    ef.EF21Plus(TOP),
    ef.EF21(TOP, server_compressor=ef.TopK(k=ef.Linear(90, 10, steps=6))),
    ef.DoubleSqueeze(ef.Then(TOP, ef.Natural()), server_compressor=TOP),
    ef.ErrorCompensatedX(TOP, server_compressor=TOP, alpha=ef.Linear(0.9, 0.1, steps=8)),
    ef.MomentumCorrection(ef.RandomK(WARM_UP)),
    ef.PerturbedCompressedSGD(ef.RandomSparsify(WARM_UP), reset_every=5),
    ef.ErrorFeedback(ef.HardThreshold(ef.Piecewise({0: 0.1, 4: 2.0}))),
    ef.NoFeedback(ef.QSGD(ef.Piecewise({0: 100, 4: 7}))),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def at(method, t):
    """The method with the compressors of a step."""
    parts = {name: getattr(method, name, None) for name in ("compressor", "server_compressor")}
    return replace(method, **{name: c.at(t) for name, c in parts.items() if c is not None})


@each_method
def test_each_step_is_that_of_the_compressors_of_the_step(method):
    group, fixed = Workers(method, 3), Workers(at(method, 0), 3)
    for t, g in enumerate(gradients(3, 12)):
        fixed.method = at(method, t)
        found, expected = group.step(g, t), fixed.step(g, t)
        assert [bytes(one) for one in found[0]] == [bytes(one) for one in expected[0]]
        assert found[1].tobytes() == expected[1].tobytes()


@pytest.mark.parametrize("framework", ["numpy", "torch", "tensorflow"])
@pytest.mark.parametrize("exchange", ["gather", "reduce", "double_pass"])
@each_method
def test_all_exchanges_carry_them(method, exchange, framework):
    """All ranks get the same bits, those of the aggregator in one process."""
    if exchange == "reduce" and not method.allreducible:
        return
    like, g = array_of(framework, float32_zeros(D)), gradients(3, 12)
    ranks = channels(method, 3, like, exchange=exchange)
    steps = []
    for t in range(12):
        each = run_channels(ranks, g[t], t)
        assert len({one.tobytes() for one in each}) == 1
        steps.append(each[0])
    if exchange != "double_pass":
        group = Workers(method, 3, name="weights")
        np.testing.assert_allclose(np.array(steps), group.run(g), rtol=1e-4, atol=1e-4)
    sent = ranks[0].stats().bytes_out
    assert 0 < sent < 12 * 2 * 4 * D * 2


@each_method
def test_a_bad_gradient_in_any_step_drops_it(method):
    """The message of a step that is dropped is as long as the others."""
    ranks, g = channels(method, 3), gradients(3, 10)
    for t in range(10):
        spoiled = g[t].copy()
        spoiled[1, 3] = np.nan
        before = [memory(method, channel.worker) for channel in ranks]
        assert run_channels(ranks, spoiled, t) == [None] * 3
        assert [memory(method, channel.worker) for channel in ranks] == before
        assert None not in [type(one) for one in run_channels(ranks, g[t], t)]


def test_the_bytes_are_those_of_the_step():
    method = ef.ErrorFeedback(TOP)
    ranks, g, sent = channels(method, 3), gradients(3, 10), [0]
    for t in range(10):
        run_channels(ranks, g[t], t)
        sent.append(ranks[0].stats().bytes_out)
    expected = [2 * TOP.at(t).nbytes(D) for t in range(10)]
    assert np.diff(sent).tolist() == expected
    assert len(set(expected)) == 5


@pytest.mark.parametrize("method", METHODS[:3], ids=repr)
def test_simulated_servers_reduce_by_the_step(method):
    targets = gradients(1, 3)[:, 0]

    def run(exchange):
        return ef.simulate(
            method,
            lambda i, x, t: x - targets[i],
            float32_zeros(D),
            workers=3,
            steps=12,
            step_size=0.1,
            exchange=exchange,
        )

    assert run("server").x.tobytes() == run("gather").x.tobytes()


def test_buffers_of_a_server_hold_the_longest_message():
    for compressor in (TOP, ef.QSGD(ef.Linear(32767, 1, steps=8)), ef.Then(TOP, ef.Natural())):
        method = ef.NoFeedback(compressor)
        room = longest_message(BucketSpec("x", D, repr(method), 0))
        assert all(compressor.at(t).nbytes(D) < room for t in range(9))


def test_dense_steps_and_a_schedule_count_the_same_steps():
    method = ef.ErrorFeedback(TOP)
    ranks, g, sent = channels(method, 3, dense_steps=3), gradients(3, 10), [0]
    for t in range(10):
        run_channels(ranks, g[t], t)
        sent.append(ranks[0].stats().bytes_out)
    assert np.diff(sent)[3:].tolist() == [2 * TOP.at(t).nbytes(D) for t in range(3, 10)]
