"""The double pass: what travels, what it costs, and what one rank's trouble does to the others."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from workers import channels, gradients, run_channels

import ef_horovod as ef
from ef_horovod import wire
from ef_horovod.exchange.channel import conclude, settle
from ef_horovod.exchange.double_pass import cuts
from ef_horovod.testing.echo import EchoTransport
from ef_horovod.testing.frameworks import OneChannel
from ef_horovod.training.buckets import Slot, plan_buckets
from ef_horovod.training.choice import choose, open_channel
from ef_horovod.training.state import read_state, write_state
from ef_horovod.transports.base import Transport
from ef_horovod.transports.local import local_group

ONE_BIT = ef.DoubleSqueeze(ef.OneBit(), server_compressor=ef.OneBit())
TOP_K = ef.EF21(ef.TopK(ratio=0.1), server_compressor=ef.TopK(ratio=0.05))
D = 4096


def group_of(method, ranks, d=D, timeout=5.0):
    like = np.zeros(d, np.float32)
    return [
        open_channel("x", like, method, end, exchange="double_pass", seed=1)
        for end in local_group(ranks, timeout)
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("d", [0, 1, 8, 9, 63, 1200, 4096])
def test_slices_cover_the_vector_and_are_about_equal(d, ranks):
    bounds = cuts(d, ranks)
    assert len(bounds) == ranks
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(d))
    lengths = [stop - start for start, stop in bounds]
    assert max(lengths) - min(lengths) <= 15
    assert all(start % 8 == 0 or start == d for start, _ in bounds)


@pytest.mark.parametrize("method", [ONE_BIT, TOP_K, ef.ErrorFeedback(ef.TopK(ratio=0.1))], ids=repr)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_bytes_are_those_of_theory(method, ranks):
    """Answers of methods that compress one way are float32, with the header of a payload."""
    group, steps = group_of(method, ranks), 3
    for t, g in enumerate(gradients(ranks, steps, d=D)):
        run_channels(group, g, t)
    part = D // ranks
    down = getattr(method, "server_compressor", None) or ef.Identity()
    theory = ef.cost.double_pass_traffic(method.compressor.nbytes(part), down.nbytes(part), ranks)
    for channel in group:
        stats = channel.stats()
        assert (stats.bytes_out, stats.bytes_in) == (steps * theory.sent, steps * theory.received)
        assert stats.exchange == "double_pass"
        assert stats.steps == steps


@pytest.mark.parametrize("method", [ONE_BIT, TOP_K], ids=repr)
def test_bytes_against_a_ring_do_not_grow_with_the_ranks(method):
    """And a worker never sends more than a message and an answer of the whole vector."""
    shares = []
    for ranks in (2, 4, 8, 16):
        group = group_of(method, ranks, 65536)
        run_channels(group, gradients(ranks, 1, d=65536)[0], 0)
        stats = group[0].stats()
        shares.append(stats.ratio)
        headers = ranks * 2 * (wire.HEADER_NBYTES + 4)
        whole = method.compressor.nbytes(65536) + method.server_compressor.nbytes(65536)
        assert stats.bytes_out < 1.01 * whole + headers
    assert max(shares) < 1.2 * min(shares)


@pytest.mark.parametrize("method", [ONE_BIT, TOP_K, ef.NoFeedback(ef.Identity())], ids=repr)
@pytest.mark.parametrize("d", [0, 1, 5, 8, 20])
def test_fewer_elements_than_ranks_can_share(method, d):
    """Some ranks own nothing then: they send headers."""
    ranks = 5
    group, g = group_of(method, ranks, d), gradients(ranks, 4, d=d)
    for t, parts in enumerate(g):
        directions = run_channels(group, parts, t)
        assert len({direction.tobytes() for direction in directions}) == 1
        assert directions[0].shape == (d,)
    if method == ef.NoFeedback(ef.Identity()):
        np.testing.assert_allclose(directions[0], g[-1].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", [0, D // 2, D - 1])
def test_a_bad_number_in_one_slice_is_told_to_all_owners(place):
    group, (g,) = group_of(ONE_BIT, 3), gradients(3, 1, d=D)
    g[1, place] = np.nan
    assert run_channels(group, g, 0) == [None] * 3
    for channel in group:
        assert channel.stats().skipped == 1
        assert np.isnan(channel.stats().relative_error)
        states = [piece.channel.worker.error for piece in channel.pieces()]
        assert not any(error.any() for error in states)


def test_a_sum_that_overflows_at_one_owner_raises_on_all_ranks():
    """Finite messages, an infinite sum: owner 2 alone sees it, and nobody may hang."""
    group = group_of(ef.DoubleSqueeze(ef.Identity(), server_compressor=ef.OneBit()), 3, timeout=20)
    for channel in group:
        channel.gradient[:] = 1.0
        channel.gradient[-1] = 3e38
        channel.start(0)
    assert all([settle([channel]) for channel in group])
    for channel in group:
        with pytest.raises(ef.NonFiniteError, match=r"slice 2 of 'x' have no finite sum"):
            conclude([channel], good=True)


def test_messages_of_varying_length_travel_in_size_classes():
    method = ef.DoubleSqueeze(ef.HardThreshold(1.0), server_compressor=ef.HardThreshold(0.5))
    assert not method.fixed_size
    assert not method.fixed_size_answers
    group, sent = group_of(method, 3), []
    for t, g in enumerate(gradients(3, 5, d=D)):
        before = group[0].stats().bytes_out
        run_channels(group, g, t)
        sent.append(group[0].stats().bytes_out - before)
    assert len(set(sent)) > 1
    assert all(nbytes % 16 == 0 for nbytes in sent)


def test_the_error_of_a_step_is_that_of_the_whole_vector():
    method = ef.ErrorFeedback(ef.TopK(ratio=0.1))
    group, (g,) = group_of(method, 2), gradients(2, 1, d=D)
    run_channels(group, g, 0)
    lost = np.concatenate([piece.channel.worker.error for piece in group[1].pieces()])
    expected = np.linalg.norm(lost) / np.linalg.norm(g[1])
    assert group[1].stats().relative_error == pytest.approx(expected, rel=1e-5)


def test_a_rank_that_does_not_come_is_named():
    group = group_of(ONE_BIT, 2, timeout=0.2)
    group[0].start(0)
    with pytest.raises(ef.CollectiveTimeoutError, match=r"in 'alltoall.x' for ranks \[1\]"):
        group[0].arrived()
    group = group_of(ONE_BIT, 2, timeout=0.2)
    for channel in group:
        channel.start(0)
    assert settle([group[0]])
    with pytest.raises(ef.CollectiveTimeoutError, match=r"'allgather.x.answers' for ranks \[1\]"):
        conclude([group[0]], good=True)


def test_ranks_in_threads_of_their_own():
    """As in a job: nobody starts, waits or answers for another rank."""
    alone = group_of(TOP_K, 3)
    expected = [run_channels(alone, g, t)[0].tobytes() for t, g in enumerate(GRADIENTS)]
    group, ends = group_of(TOP_K, 3, timeout=60), {}

    def walk(rank):
        ends[rank] = []
        for t, g in enumerate(GRADIENTS):
            group[rank].gradient[:] = g[rank]
            group[rank].start(t)
            good = settle([group[rank]])
            ends[rank].append(conclude([group[rank]], good=good)[0].tobytes())

    threads = [threading.Thread(target=walk, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [ends[rank] for rank in range(3)] == [expected] * 3


GRADIENTS = gradients(3, 20, d=D)


def test_memories_belong_to_parameters_and_slices():
    """Parameter b lies in two slices; the aggregator's memory is the owner's alone."""
    slots = [Slot("a", None, 0, 100), Slot("b", None, 100, 300), Slot("c", None, 300, D)]
    group = group_of(ONE_BIT, 16)
    run_channels(group, gradients(16, 1, d=D)[0], 0)
    saved = read_state([OneChannel(group[1], slots)])
    assert saved["a"].keys() == {"slice.0.worker.error"}
    assert saved["b"].keys() == {
        "slice.0.worker.error",
        "slice.1.worker.error",
        "slice.1.server.error",
    }
    assert [len(vector) for vector in saved["b"].values()] == [156, 44, 44]
    group[2].pieces()[1].channel.worker.error[:] = 7
    write_state([OneChannel(group[1], slots)], saved)
    with pytest.raises(ValueError, match="names, sizes or kinds differ"):
        write_state([OneChannel(group[2], slots)], saved)  # another rank owns another slice
    whole = channels(ONE_BIT, 1)[0]
    with pytest.raises(ValueError, match="names, sizes or kinds differ"):
        write_state([OneChannel(whole, [Slot("a", None, 0, 500)])], saved)


def test_small_parameters_share_the_allreduce_as_before():
    plans = plan_buckets(
        [("w", np.zeros((50, 50), np.float32)), ("b", np.zeros(50, np.float32))],
        ONE_BIT,
        dense=lambda name, _: name == "b",
        bucket_bytes=1 << 20,
        device_of=lambda _: None,
    )
    (end,) = local_group(1)
    opened = [
        plan.open(np.zeros(plan.length, np.float32), end, exchange="double_pass") for plan in plans
    ]
    assert [channel.exchange.name for channel in opened] == ["dense", "double_pass"]


def test_what_looks_at_matrices_is_refused():
    method = ef.PowerSGD(rank=2)
    for refused in (
        lambda: choose("double_pass", method),
        lambda: open_channel(
            "x", np.zeros(64, np.float32), method, local_group(1)[0], exchange="double_pass"
        ),
        lambda: ef.simulate(
            method, lambda i, x, t: x, np.zeros((8, 8)), workers=2, steps=1, step_size=1.0,
            exchange="double_pass",
        ),
    ):  # fmt: skip
        with pytest.raises(ef.UnsupportedError, match="looks at whole matrices; use exchange='aut"):
            refused()


def test_a_transport_without_an_all_to_all_says_so():
    class Mute(EchoTransport):
        alltoall = Transport.alltoall

    channel = open_channel("x", np.zeros(64, np.float32), ONE_BIT, Mute(2), exchange="double_pass")
    with pytest.raises(ef.UnsupportedError, match="all-to-all for Mute"):
        channel.start(0)


def test_simulation_counts_what_theory_says_and_reaches_the_optimum():
    targets = np.random.default_rng(0).normal(size=(4, 256))
    run = ef.simulate(
        ef.EF21(ef.TopK(ratio=0.25), server_compressor=ef.TopK(ratio=0.25)),
        lambda i, x, t: x - targets[i],
        np.zeros((16, 16)).reshape(256), workers=4, steps=300, step_size=0.1,
        exchange="double_pass",
    )  # fmt: skip
    theory = ef.cost.traffic(ef.TopK(ratio=0.25), 256, 4, "double_pass")
    assert run.bytes_sent == 300 * theory.sent
    assert run.bytes_received == 300 * theory.received
    np.testing.assert_allclose(run.x, targets.mean(0), atol=1e-3)
    assert [len(states) for states in run.states] == [4] * 4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_simulation_names_the_worker_of_a_bad_gradient(bad):
    def gradient(worker, x, step):
        return x - (bad if (worker, step) == (2, 5) else 1.0)

    with pytest.raises(ef.NonFiniteError, match="worker 2, step 5"):
        ef.simulate(
            TOP_K, gradient, np.zeros(100), workers=3, steps=9, step_size=0.1,
            exchange="double_pass",
        )  # fmt: skip


def test_simulation_on_ranks_is_refused():
    with pytest.raises(
        ef.UnsupportedError, match="expected none, because each worker has a slice here"
    ):
        ef.simulate(
            TOP_K, lambda i, x, t: x, np.zeros(100), workers=2, steps=1, step_size=0.1,
            exchange="double_pass", transport=local_group(1)[0],
        )  # fmt: skip
