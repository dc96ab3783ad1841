"""What `exchange="auto"` takes: alike on all ranks, and dense only if told of a network."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from workers import gradients, run_channels

import ef_horovod as ef
from ef_horovod.exchange.double_pass import SlicedChannel
from ef_horovod.exchange.registry import EXCHANGES
from ef_horovod.testing.echo import EchoTransport
from ef_horovod.testing.frameworks import OneChannel
from ef_horovod.training.buckets import describe, one_slot, plan_buckets
from ef_horovod.training.choice import choose, decide, open_channel
from ef_horovod.transports.base import Transport
from ef_horovod.transports.local import local_group

MILLION = 10**6
BOTH = ef.DoubleSqueeze(ef.OneBit(), server_compressor=ef.OneBit())
ONE_WAY = ef.EF21(ef.TopK(0.01))
DENSE = ef.NoFeedback(ef.Identity())


def named(choice):
    """Its exchange by name, and its method."""
    return choice.exchange.name, choice.method


def taken(method, d, workers, exchange="auto"):
    return decide(exchange, method, d, EchoTransport(workers)).exchange.name


@pytest.mark.parametrize(
    ("method", "d", "workers", "expected"),
    [
        (BOTH, 4 * MILLION, 2, "gather"),  # the same bytes either way, one collective less
        (BOTH, 4 * MILLION, 8, "double_pass"),
        (BOTH, 4 * MILLION, 64, "double_pass"),
        (BOTH, 2000, 8, "gather"),  # which takes one wait, not two
        (BOTH, 4 * MILLION, 1, "gather"),
        (ONE_WAY, 4 * MILLION, 8, "gather"),
        (ONE_WAY, 4 * MILLION, 300, "double_pass"),  # messages of 300 weigh more than the answer
        # k of each slice would be n times as many.
        (ef.EF21(ef.TopK(k=40_000), server_compressor=ef.TopK(k=40_000)), 4 * MILLION, 8, "gather"),
        (ef.EF21(ef.RandomK(0.01)), 4 * MILLION, 8, "reduce"),
        (ef.PowerSGD(rank=4), 4 * MILLION, 300, "reduce"),
        (ef.PowerSGD(ef.Cast("float16"), rank=4), 4 * MILLION, 300, "gather"),  # not to be cut
        (ef.ErrorFeedback(ef.HardThreshold(0.1)), 4 * MILLION, 300, "gather"),  # of unknown size
        (DENSE, 4 * MILLION, 8, "dense"),
    ],
    ids=repr,
)
def test_auto_takes_the_cheapest_way_of_the_same_algorithm(method, d, workers, expected):
    assert named(decide("auto", method, d, EchoTransport(workers))) == (expected, method)


def test_a_method_that_compresses_one_way_is_never_made_to_compress_twice():
    like = np.zeros(64, np.float32)
    group = [open_channel("x", like, ONE_WAY, end, exchange="double_pass")
             for end in local_group(2, 5)]  # fmt: skip
    g = np.ones((2, 64), np.float32)
    for channel, own in zip(group, g, strict=True):
        channel.gradient[:] = own
        channel.start(0)
    assert all([channel.arrived() for channel in group])
    for channel in group:
        channel.reply()
    answers = [ef.Payload.from_start(data) for data in group[0]._finish()]
    assert [answer.kind for answer in answers] == [ef.Identity] * 2


def test_all_ranks_and_runs_decide_alike():
    found = {
        (end.rank, decide(exchange, method, d, end).exchange.name)
        for _ in range(3)
        for end in local_group(8)
        for method, d in ((BOTH, 4 * MILLION),)
        for exchange in ("auto", "auto:1gbit")
    }
    assert {kind for _, kind in found} == {"double_pass"}
    assert len(found) == 8


def test_what_auto_took_is_what_runs_and_what_ranks_compare():
    d = 1 << 20
    ends = local_group(8, 5)
    group = [open_channel("x", np.zeros(d, np.float32), BOTH, end) for end in ends]
    named = [open_channel("x", np.zeros(d, np.float32), BOTH, end, exchange="double_pass")
             for end in local_group(8, 5)]  # fmt: skip
    assert all(isinstance(channel, SlicedChannel) for channel in group)
    assert group[0].stats().exchange == "double_pass"
    for t, g in enumerate(gradients(8, 2, d=d)):
        directions = run_channels(group, g, t)
        np.testing.assert_array_equal(directions[0], run_channels(named, g, t)[0])
    slots = one_slot("w", np.zeros(d, np.float32))
    assert describe([OneChannel(group[0], slots)])[0].endswith(f"x by {BOTH!r} (double_pass)")


class Gatherers(EchoTransport):
    """A transport from elsewhere that has no all-to-all."""

    alltoall = Transport.alltoall


class Served(EchoTransport):
    """One with a server."""

    has_server = True


def test_auto_takes_what_the_transport_has():
    assert decide("auto", BOTH, 4 * MILLION, Gatherers(8)).exchange.name == "gather"
    for exchange in ("auto", "auto:100gbit"):
        assert named(decide(exchange, BOTH, 4 * MILLION, Served(8))) == ("server", BOTH)


def test_a_fast_network_that_was_named_leaves_vectors_dense_and_says_so_once():
    with pytest.warns(
        UserWarning, match="leaves gradients uncompressed where .* is not predicted"
    ) as w:
        chosen = [named(decide("auto:400gbit,0us", ONE_WAY, MILLION, e)) for e in local_group(4)]
    assert chosen == [("dense", DENSE)] * 4
    assert len(w) == 1, "rank 0 alone"


@pytest.mark.parametrize("exchange", ["auto", "auto:100mbit", "auto:1gbit,1ms"])
def test_without_a_network_or_on_a_slow_one_it_compresses(exchange):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert named(decide(exchange, ONE_WAY, MILLION, EchoTransport(4))) == ("gather", ONE_WAY)


@pytest.mark.filterwarnings("ignore:.*leaves gradients uncompressed")
def test_what_stays_dense_is_treated_as_small_parameters_are():
    noisy = ef.PerturbedCompressedSGD(ef.TopK(0.01), noise=0.1)
    exact = noisy.uncompressed()
    assert named(decide("auto:400gbit,0us", noisy, MILLION, EchoTransport(4))) == ("reduce", exact)
    parameters = [("a", np.zeros((64, 64), np.float32)), ("b", np.zeros(5, np.float32))]
    plans = plan_buckets(
        parameters, ONE_WAY, dense=lambda name, p: p.ndim == 1, bucket_bytes=10**6,
        device_of=lambda p: None,
    )  # fmt: skip
    opened = [
        plan.open(np.zeros(plan.length, np.float32), EchoTransport(4), exchange="auto:400gbit,0us")
        for plan in plans
    ]
    assert [(c.exchange.name, c.method) for c in opened] == [("dense", DENSE)] * 2


@pytest.mark.filterwarnings("ignore:.*leaves gradients uncompressed")
def test_directions_of_vectors_left_dense_are_means():
    group = [
        open_channel("x", np.zeros(1000, np.float32), ONE_WAY, end, exchange="auto:400gbit,0us")
        for end in local_group(3, 5)
    ]
    g = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
    for direction in run_channels(group, g, 0):
        np.testing.assert_allclose(direction, g.mean(axis=0), rtol=1e-5, atol=1e-6)
    assert group[0].stats().method == repr(DENSE)


def test_a_network_that_does_not_pay_is_no_reason_to_change_what_is_uncompressed_anyway():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = ef.PerturbedCompressedSGD(ef.Identity(), noise=0.1)
        assert taken(exact, MILLION, 4, "auto:400gbit,0us") == "reduce"
        assert taken(DENSE, MILLION, 4, "auto:400gbit,0us") == "dense"


@pytest.mark.parametrize("exchange", ["auto:", "auto:fast", "auto:1gbit,slow"])
def test_a_network_that_is_none_is_refused(exchange):
    message = f"^got exchange='{exchange}', expected a network .*; got the (rate|time) "
    with pytest.raises(ValueError, match=message):
        choose(exchange, ONE_WAY)


def test_simulate_takes_no_slices():
    assert choose("auto", BOTH) is choose("auto:1gbit", BOTH) is EXCHANGES["gather"]


def by_nodes(nodes, method=ONE_WAY, d=4 * MILLION, exchange="auto", dense_steps=0):
    """What each rank takes, with the numbers of its node's ranks."""
    ends = local_group(len(nodes), nodes=nodes)
    return {decide(exchange, method, d, end, dense_steps).exchange.name for end in ends}


@pytest.mark.parametrize(
    ("nodes", "method", "d", "expected"),
    [
        ([0] * 4 + [1] * 4, ONE_WAY, 4 * MILLION, "hierarchical:gather"),
        ([0, 1] * 4, ONE_WAY, 4 * MILLION, "hierarchical:gather"),
        ([0, 0, 1, 1], ONE_WAY, 4 * MILLION, "gather"),  # as fast on 1 Gbit/s
        ([0] * 4 + [1] * 4, ef.EF21(ef.RandomK(0.01)), 4 * MILLION, "reduce"),  # a ring already
        ([j // 4 for j in range(64)], BOTH, 4 * MILLION, "hierarchical:double_pass"),
        ([0] * 4 + [1] * 4, ONE_WAY, 2000, "gather"),  # which is one collective, not four
        ([0, 0, 0, 0], ONE_WAY, 4 * MILLION, "gather"),  # one node
        ([0, 1, 2, 3], ONE_WAY, 4 * MILLION, "gather"),  # one rank on each
        (
            [0] * 4 + [1] * 3,
            ONE_WAY,
            4 * MILLION,
            "gather",
        ),  # unequal: a leader would compress alone
        ([0] * 4 + [1] * 4, ef.PowerSGD(rank=2), 4 * MILLION, "reduce"),  # not to be cut
        ([0, 0, 1, 1], ef.ErrorFeedback(ef.HardThreshold(0.1)), 4 * MILLION, "gather"),
        ([0, 0, 1, 1], DENSE, 4 * MILLION, "dense"),
    ],
    ids=repr,
)
def test_auto_sums_within_a_node_where_nodes_have_several_ranks_and_it_pays(
    nodes, method, d, expected
):
    assert by_nodes(nodes, method, d) == {expected}


def test_on_a_named_slow_network_it_pays_earlier():
    taken = by_nodes([0, 0, 1, 1], exchange="auto:100mbit")
    assert taken == {"hierarchical:gather"}


def test_the_exchange_between_nodes_is_the_cheapest_for_their_number():
    many = [j // 2 for j in range(32)]
    assert by_nodes(many, BOTH, exchange="hierarchical") == {"hierarchical:double_pass"}
    assert by_nodes([0, 0, 1, 1], BOTH, exchange="hierarchical") == {"hierarchical:gather"}
    assert by_nodes(many, BOTH, exchange="hierarchical:gather") == {"hierarchical:gather"}


class Fixed(EchoTransport):
    """Four ranks on each node, in a job whose groups of ranks cannot be made."""

    levels_known, ranks_per_node, tries = False, 4, 0

    def _open_levels(self):
        self.tries += 1
        raise ef.UnsupportedError("got no groups")


def test_auto_goes_on_without_the_groups_of_ranks_and_says_so():
    transport = Fixed(8)
    with pytest.warns(UserWarning, match="although 4 ranks share .*write hvd.init") as w:
        names = [decide("auto", ONE_WAY, 4 * MILLION, transport).exchange.name for _ in range(3)]
    assert names == ["gather"] * 3
    assert transport.tries == 1, "making groups is collective"
    assert len({str(one.message) for one in w}) == 1
    with pytest.raises(ef.UnsupportedError, match="got no groups"):
        decide("hierarchical", ONE_WAY, 4 * MILLION, transport)


def test_dense_steps_keep_the_collectives_of_graphs():
    """Two levels in all steps, with sums in place of gathers; elsewhere one flat sum."""
    end = local_group(8, nodes=[0, 1] * 4)[0]
    taken = decide("auto", ONE_WAY, 4 * MILLION, end, 5)
    assert taken.exchange.name == "hierarchical:gather"
    dense, in_graph = taken.warm_up(), taken.warm_up(in_graph=True)
    assert (dense.method, in_graph.method) == (DENSE, DENSE)
    assert dense.exchange.name == "dense"
    assert in_graph.exchange.inner(DENSE).name == "reduce"
    both = decide("hierarchical:double_pass", BOTH, MILLION, end, 5).warm_up(in_graph=True)
    assert both.exchange.name == "hierarchical:double_pass"
