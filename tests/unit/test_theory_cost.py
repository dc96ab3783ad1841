"""The cost model: its bytes are those that channels count, its seconds what the formulas say."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from workers import gradients, run_channels

import ef_horovod as ef
from ef_horovod import cost
from ef_horovod.common.units import read_count, read_rate, read_seconds, show_seconds
from ef_horovod.cost.model import reference_work
from ef_horovod.exchange.network import OPEN_MPI, OPEN_MPI_RING, Collective
from ef_horovod.training.choice import open_channel
from ef_horovod.transports.local import local_group

D, STEPS = 4096, 2
ONE_BIT, TOP_K = ef.OneBit(), ef.TopK(0.05)
METHODS = [
    ef.EF21(TOP_K),
    ef.EF21(TOP_K, server_compressor=ef.TopK(0.1)),
    ef.ErrorFeedback(ONE_BIT),
    ef.DoubleSqueeze(ONE_BIT, server_compressor=ONE_BIT),
    ef.DoubleSqueeze(TOP_K),
    ef.EF21(ef.RandomK(0.05)),
    ef.NoFeedback(ef.QSGD(4)),
    ef.NoFeedback(ef.Identity()),
    ef.PowerSGD(rank=2, shapes=((32, 128),)),
    ef.EF21Plus(TOP_K),
]
NETWORK = cost.Network(1e8, 1e-3)


def counted(method, workers, kind):
    """Bytes out and in of a worker a step, by the channels of a job in one process."""
    like = np.zeros(D, np.float32)
    group = [open_channel("x", like, method, end, exchange=kind) for end in local_group(workers, 5)]
    for t, g in enumerate(gradients(workers, STEPS, d=D)):
        run_channels(group, g, t)
    out, into = (
        [getattr(c.stats(), way) / STEPS for c in group] for way in ("bytes_out", "bytes_in")
    )
    return np.mean(out), np.mean(into)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("kind", ["gather", "reduce", "double_pass", "dense"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_bytes_are_those_that_channels_count(method, kind, workers):
    if kind != "dense" and kind not in cost.possible_exchanges(method):
        if method != ef.NoFeedback(ef.Identity()):
            with pytest.raises(ValueError, match="got exchange='(reduce|double_pass)' with"):
                cost.method_traffic(method, D, workers, kind)
        return
    travelling = ef.NoFeedback(ef.Identity()) if kind == "dense" else method
    moved = cost.method_traffic(method, D, workers, kind)
    assert (moved.sent, moved.received) == pytest.approx(counted(travelling, workers, kind))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_bytes_of_a_server_are_those_that_simulate_counts(method):
    if isinstance(method, ef.PowerSGD):
        method = ef.PowerSGD(rank=2)  # of one square matrix, as a bare vector is
    run = ef.simulate(
        method, lambda i, x, t: np.ones(D), np.zeros(D), workers=3, steps=STEPS, step_size=0.0,
        exchange="server",
    )  # fmt: skip
    moved = cost.method_traffic(method, D, 3, "server")
    assert (moved.sent, moved.received) == (run.bytes_sent / STEPS, run.bytes_received / STEPS) or (
        # Factors come back as numbers, of one length in even and of another in odd steps.
        isinstance(method, ef.PowerSGD)
    )
    assert moved.sent == pytest.approx(run.bytes_sent / STEPS)


def test_messages_of_unknown_size_are_refused():
    for method in (
        ef.ErrorFeedback(ef.HardThreshold(0.1)),
        ef.EF21(TOP_K, participation=0.5),
    ):
        with pytest.raises(ValueError, match="give the average size that a run sent"):
            cost.method_traffic(method, D, 4, "gather")


def test_a_ring_takes_what_the_formula_says():
    ring = Collective(stretch=1.5, in_turn="ring")
    sent = 12e6
    frames = (1514 + 33) / 1448
    expected = 3 * 1e-3 + 1.5 * frames * 8 * sent / 1e8
    assert ring.seconds(sent, 4, NETWORK) == pytest.approx(expected)
    assert ring.seconds(0, 4, NETWORK) == pytest.approx(3e-3)
    assert ring._replace(passes=2).seconds(0, 4, NETWORK) == pytest.approx(6e-3)
    tree = ring._replace(in_turn="tree", pair=1.0)
    assert tree.seconds(0, 9, NETWORK) == pytest.approx(4e-3)
    assert tree.seconds(sent, 2, NETWORK) == pytest.approx(1e-3 + frames * 8 * sent / 1e8)


def test_a_step_is_the_sum_of_its_parts():
    work = cost.Work(push=1e-9, decode=2e-9, aggregate=3e-9, pull=4e-9, copy=5e-9)
    options = {"work": work, "compute": 0.5, "share": 2.0}
    d, method = 10**6, ef.DoubleSqueeze(ONE_BIT, server_compressor=ONE_BIT)
    gather = cost.step_cost(method, d, 4, "gather", NETWORK, **options)
    assert (gather.compute, gather.compress) == (0.5, pytest.approx(2e-3))
    assert gather.decode == pytest.approx(2e-3 * (4 * 2 + 3 + 4))
    assert gather.step == pytest.approx(0.5 + gather.compress + gather.network + gather.decode)
    slices = cost.step_cost(method, d, 4, "double_pass", NETWORK, **options)
    assert slices.compress == pytest.approx(2e-3 * (1 + 2 * 5))
    assert slices.decode == pytest.approx(2e-3 * (2 + 3 / 4 + 2 * 5 + 4))
    dense = cost.step_cost(method, d, 4, "dense", NETWORK, **options)
    assert (dense.compress, dense.decode) == (0.0, pytest.approx(2e-3 * 5))


def test_what_sends_more_or_slower_takes_longer():
    method = ef.DoubleSqueeze(ONE_BIT, server_compressor=ONE_BIT)

    def seconds(kind, workers, rate=1e8, d=10**7):
        return cost.step_cost(method, d, workers, kind, cost.Network(rate)).network

    for kind in ("dense", "gather", "double_pass", "server"):
        for slow, fast in pairwise((5e7, 1e8, 1e9, 1e10)):
            assert seconds(kind, 4, slow) > seconds(kind, 4, fast)
    assert seconds("gather", 64) > 20 * seconds("gather", 2)
    assert seconds("double_pass", 64) < 3 * seconds("double_pass", 2)
    assert seconds("server", 64) > 20 * seconds("server", 2)
    for kind in ("dense", "gather", "double_pass"):
        assert seconds(kind, 1) == 0.0


def test_fast_networks_are_limited_by_the_core():
    def step(rate):
        return cost.step_cost(METHODS[0], 10**7, 4, "dense", cost.Network(rate, 0.0))

    moved = step(1e9).traffic
    assert step(1e15).network == OPEN_MPI.core * (moved.sent + moved.received)


def test_rings_are_never_predicted_to_be_slower_for_long_messages():
    for workers in (2, 4, 8):
        times = [
            cost.step_cost(METHODS[0], 10**7, workers, "dense", NETWORK, software=software).step
            for software in (OPEN_MPI, OPEN_MPI_RING)
        ]
        assert times[0] > (1.0 if workers == 2 else 1.1) * times[1]


def test_half_precision_sends_half():
    fp16 = cost.half_precision_cost(10**6, 4, NETWORK)
    dense = cost.step_cost(METHODS[0], 10**6, 4, "dense", NETWORK)
    assert fp16.traffic.sent == dense.traffic.sent / 2
    assert 0.45 < fp16.network / dense.network < 0.55
    assert fp16.compress + fp16.decode == pytest.approx(
        1.5e6 * reference_work(METHODS[0], 10**6).copy
    )


def test_a_burst_goes_at_once():
    bucket = dataclasses.replace(NETWORK, burst=1e6)
    assert bucket.carry(1e6) == 0.0
    assert bucket.carry(3e6) == NETWORK.carry(2e6) > 0
    slow, fast = (
        cost.step_cost(METHODS[0], 10**6, 4, "gather", network) for network in (NETWORK, bucket)
    )
    assert fast.step < slow.step


@pytest.mark.parametrize(
    ("text", "network"),
    [("100mbit", (1e8, 50e-6)), ("2.5gbit,2ms", (2.5e9, 2e-3)), ("1gbit,0us", (1e9, 0.0))],
)
def test_networks_are_read_from_text(text, network):
    read = cost.Network.read(text)
    assert (read.bandwidth, read.latency, read.burst) == pytest.approx((*network, 0.0))


@pytest.mark.parametrize("text", ["", "fast", "100mbit,", "100mbit,2", "1gbit,2ms,3", "100"])
def test_what_is_no_network(text):
    with pytest.raises(ValueError, match="got the (rate|time)"):
        cost.Network.read(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 2.5}, "ef.cost got n=2.5, expected a whole number"),
        ({"exchange": "auto:1gbit"}, "ef.cost got exchange='auto:1gbit', expected one of"),
        ({"share": 0.0}, r"ef.cost got share=0.0, expected a number in \(0, inf\)"),
        ({"compute": -1.0}, "ef.cost got compute=-1.0, expected a number in"),
        ({"work": cost.Work(0, 0, -1e-9, 0, 0)}, "Work got aggregate=-1e-09, expected a number"),
    ],
)
def test_what_would_make_no_sense_of_a_step_is_refused(changes, message):
    given = {"method": METHODS[0], "d": D, "n": 4, "exchange": "gather", "network": NETWORK}
    with pytest.raises(ValueError, match=f"^{message}.*; "):
        cost.step_cost(**{**given, **changes})
    if "exchange" not in changes:
        with pytest.raises(ValueError, match=f"^{message}.*; "):
            cost.half_precision_cost(**{"d": D, "n": 4, "network": NETWORK, **changes})


def test_units():
    assert (read_rate("1gbit"), read_seconds("250us"), read_count("1.5B")) == (
        10**9, pytest.approx(2.5e-4), 1_500_000_000,
    )  # fmt: skip
    assert [show_seconds(s) for s in (1234.0, 0.5, 1e-9)] == ["1,234 s", "500 ms", "0.001 us"]
    for text in ("0", "many", "-3", "1.2.3", "3 M"):
        with pytest.raises(ValueError, match="expected a count of 1 or more"):
            read_count(text)


SPARSE = ef.EF21(ef.TopK(0.01))
FOUR = cost.Network(1e8, workers_per_node=4)


def test_a_node_sends_one_message_by_two_levels_and_many_without():
    d, n = 3_600_000, 8

    def node_sent(kind, network=FOUR, **options):
        return cost.step_cost(SPARSE, d, n, kind, network, **options).node_sent

    message = SPARSE.compressor.nbytes(d)
    assert node_sent("gather") == 16 * message  # each of 4 ranks to each of 4
    assert node_sent("gather", software=OPEN_MPI_RING) == 7 * message
    assert node_sent("hierarchical:gather") == pytest.approx(message, rel=1e-3)
    alone = cost.Network(1e8)
    assert cost.step_cost(SPARSE, d, 2, "gather", alone).node_sent == message
    assert node_sent("dense", software=OPEN_MPI_RING) == cost.dense_traffic(d, n).sent


def test_two_levels_are_the_exchange_between_nodes_where_there_is_one_level():
    d = 3_600_000
    flat = cost.step_cost(SPARSE, d, 4, "gather", cost.Network(1e8))
    assert cost.step_cost(SPARSE, d, 4, "hierarchical", cost.Network(1e8)) == flat
    one = cost.step_cost(SPARSE, d, 4, "hierarchical", FOUR)
    assert one == cost.step_cost(SPARSE, d, 4, "gather", FOUR)
    assert one.node_sent == 0
    assert one.network > 0


def test_a_slower_node_and_a_slower_network_both_count():
    def step(**given):
        network = cost.Network(**{"bandwidth": 1e8, "workers_per_node": 4} | given)
        return cost.step_cost(SPARSE, 3_600_000, 8, "hierarchical", network).step

    assert step(within=1e9) > step() + 0.1  # 2 times 3/4 of 14.4 MB
    assert step(bandwidth=1e7) > step() + 0.1


def test_unequal_nodes_are_refused():
    with pytest.raises(ValueError, match="got 6 workers on nodes of 4, expected equally many"):
        cost.step_cost(SPARSE, 100, 6, "gather", FOUR)
    with pytest.raises(ValueError, match="workers_per_node"):
        cost.Network(1e8, workers_per_node=0)
