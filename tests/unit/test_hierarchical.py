"""Nodes with several ranks: who compresses what, how steps are dropped, and what is refused."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import ef_horovod as ef
from ef_horovod.exchange.channel import conclude, settle
from ef_horovod.exchange.double_pass import cuts
from ef_horovod.exchange.registry import exchange_of
from ef_horovod.testing.frameworks import OneChannel
from ef_horovod.training.buckets import Slot
from ef_horovod.training.choice import choose, open_channel
from ef_horovod.training.state import read_state, write_state
from ef_horovod.transports.local import local_group
from ef_horovod.transports.nodes import Place, groups_of, nodes_of

D, STEPS = 1000, 5
TOP = ef.ErrorFeedback(ef.TopK(ratio=0.1))
BOTH_WAYS = ef.DoubleSqueeze(ef.OneBit(), server_compressor=ef.OneBit())
PAIRS, UNEQUAL = [0, 0, 1, 1], [0, 0, 1, 2, 2, 2]


def channels(nodes, method=TOP, exchange="hierarchical", d=D, **options):
    return [
        open_channel(
            "x", np.zeros(d, np.float32), method, end, exchange=exchange, seed=1, **options
        )
        for end in local_group(len(nodes), 5, one_thread=True, nodes=nodes)
    ]


def whole_numbers(ranks, steps=STEPS, d=D):
    """Gradients whose sums and means over four ranks are exact."""
    return np.random.default_rng(0).integers(-8, 9, (steps, ranks, d)).astype(np.float32)


def step(group, gradients, number, **options):
    """What each rank gets, or Nones."""
    for channel, gradient in zip(group, gradients, strict=True):
        channel.gradient[:] = gradient
        channel.start(number)
    good = settle(group, **options)
    directions = conclude(group, good=good)
    return [None] * len(group) if directions is None else [d.copy() for d in directions]


@pytest.mark.parametrize("inner", ["gather", "double_pass"])
@pytest.mark.parametrize(
    "method", [TOP, BOTH_WAYS, ef.EF21(ef.TopK(ratio=0.1)), ef.EF21(ef.OneBit())], ids=repr
)
def test_the_numbers_of_a_slice_are_those_of_one_worker_a_node(method, inner):
    group, gradients = channels(PAIRS, method, f"hierarchical:{inner}"), whole_numbers(4)
    x = np.zeros(D, np.float32)
    for t, given in enumerate(gradients):
        directions = step(group, given, t)
        assert len({d.tobytes() for d in directions}) == 1
        x -= directions[0]
    of_nodes = gradients.reshape(STEPS, 2, 2, D).mean(2)
    for j, (start, stop) in enumerate(cuts(D, 2)):
        run = ef.simulate(
            method, lambda node, x, t, part=slice(start, stop): of_nodes[t, node, part],
            np.zeros(stop - start, np.float32), workers=2, steps=STEPS, step_size=1.0, seed=1,
            name=f"x.slice.{j}", exchange=inner,
        )  # fmt: skip
        assert run.x.tobytes() == x[start:stop].tobytes()
        sent = [group[j].stats().bytes_out, group[2 + j].stats().bytes_out]
        assert sum(sent) // 2 == run.bytes_sent


@pytest.mark.parametrize("nodes", [PAIRS, UNEQUAL, [0] * 4 + [1] * 4, [0, 1, 0, 1]], ids=str)
@pytest.mark.parametrize("exchange", ["hierarchical", "hierarchical:double_pass"])
def test_the_direction_is_the_mean_over_ranks(nodes, exchange):
    group = channels(nodes, ef.NoFeedback(ef.Identity()), exchange)
    gradients = np.random.default_rng(1).normal(size=(1, len(nodes), D)).astype(np.float32)
    for direction in step(group, gradients[0], 0):
        np.testing.assert_allclose(direction, gradients[0].mean(0), rtol=1e-5, atol=1e-6)


def test_a_node_sends_what_one_rank_would():
    """The state of all ranks of a node together is that of one rank, too."""
    sent, held = [], []
    for ranks in (1, 2, 4):
        group = channels([0] * ranks + [1] * ranks, exchange="hierarchical", d=65536)
        step(group, np.random.default_rng(2).normal(size=(2 * ranks, 65536)), 0)
        sent.append(sum(channel.stats().bytes_out for channel in group[:ranks]))
        pieces = [piece for channel in group[:ranks] for piece in channel.pieces()]
        held.append(sum(piece.channel.worker.error.size for piece in pieces))
    assert max(sent) < 1.03 * min(sent)
    assert held == [65536] * 3


@pytest.mark.parametrize("nodes", [PAIRS, UNEQUAL], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, D - 1])
def test_a_bad_number_on_any_rank_drops_the_step_on_all_ranks(nodes, bad, place):
    gradients = whole_numbers(len(nodes), 3)
    for who in range(len(nodes)):
        group = channels(nodes)
        step(group, gradients[0], 0)
        before = [[p.channel.worker.error.copy() for p in c.pieces()] for c in group]
        broken = gradients[1].copy()
        broken[who, place] = bad
        assert step(group, broken, 1) == [None] * len(nodes)
        for channel, errors in zip(group, before, strict=True):
            assert channel.stats().skipped == 1
            for piece, error in zip(channel.pieces(), errors, strict=True):
                assert piece.channel.worker.error.tobytes() == error.tobytes()
        assert len({d.tobytes() for d in step(group, gradients[2], 1)}) == 1


def test_finite_gradients_whose_sum_is_not_drop_the_step():
    group = channels(PAIRS)
    huge = np.zeros((4, D), np.float32)
    huge[2:, -1] = 3e38  # slice 1 of node 1 alone
    assert step(group, huge, 0) == [None] * 4


def test_a_slice_that_cannot_be_aggregated_raises_on_all_ranks():
    """Its owners would leave the other ranks of their nodes waiting otherwise."""
    group = channels(PAIRS)
    for channel, gradient in zip(group, whole_numbers(4)[0], strict=True):
        channel.gradient[:] = gradient
        channel.start(0)
    assert settle(group)
    for channel in (group[1], group[3]):  # the owners of slice 1
        channel.inner.reduce = _fail
    for channel in group:
        channel.share()
    said = []
    for channel in group:
        with pytest.raises(ef.NonFiniteError) as caught:
            channel.commit()
        said.append(str(caught.value))
    assert said[1] == said[3] == "here"
    assert said[0].startswith("slice 1 of 'x' was not aggregated on rank 1, expected")
    assert said[2].startswith("slice 1 of 'x' was not aggregated on rank 3, expected")


def _fail(*_):
    raise ef.NonFiniteError("here")


@pytest.mark.parametrize("exchange", ["hierarchical:gather", "hierarchical:double_pass"])
@pytest.mark.parametrize(
    "method",
    [TOP, BOTH_WAYS, ef.MomentumCorrection(ef.TopK(0.1)), ef.FrozenAdam(ef.OneBit())],
    ids=repr,
)
def test_a_loaded_state_and_a_step_left_out_change_no_bit(method, exchange):
    gradients, slots = whole_numbers(4, 8), [Slot("a", None, 0, 300), Slot("b", None, 300, D)]
    whole = channels(PAIRS, method, exchange, dense_steps=2)
    for t in range(4):
        step(whole, gradients[t], t)
    saved = [read_state([OneChannel(channel, slots)]) for channel in whole]
    step(whole, gradients[7], 4, undoable=True)  # a step left out
    for channel in whole:
        channel.undo()
    again = channels(PAIRS, method, exchange, dense_steps=2)
    for channel, state in zip(again, saved, strict=True):
        write_state([OneChannel(channel, slots)], state)
    for t in range(4, 6):
        ends = step(whole, gradients[t], t) + step(again, gradients[t], t)
        assert len({d.tobytes() for d in ends}) == 1
    assert saved[0].keys() == {"a", "b"}
    assert all(name.startswith("slice.0.") for name in saved[2]["a"])
    assert saved[1].keys() == {"b"}  # slice 1 begins behind a
    with pytest.raises(ValueError, match="names, sizes or kinds differ"):
        write_state([OneChannel(again[1], slots)], saved[0])


def test_ranks_in_threads_of_their_own():
    """As in a job: nobody starts, waits or shares for another rank."""
    gradients = whole_numbers(6)
    alone = channels(UNEQUAL)
    expected = [step(alone, given, t)[0].tobytes() for t, given in enumerate(gradients)]
    group = [
        open_channel("x", np.zeros(D, np.float32), TOP, end, exchange="hierarchical", seed=1)
        for end in local_group(6, 60, nodes=UNEQUAL)
    ]
    ends = {}

    def walk(rank):
        one = [group[rank]]
        ends[rank] = [step(one, given[rank : rank + 1], t)[0].tobytes()
                      for t, given in enumerate(gradients)]  # fmt: skip

    threads = [threading.Thread(target=walk, args=(rank,)) for rank in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [ends[rank] for rank in range(6)] == [expected] * 6


def test_a_rank_that_does_not_come_is_named_by_its_number_in_the_job():
    ends = local_group(4, 0.2, nodes=PAIRS)
    group = [
        open_channel("x", np.zeros(D, np.float32), TOP, end, exchange="hierarchical")
        for end in ends
    ]
    for channel in group[2:3]:
        channel.start(0)
    with pytest.raises(ef.CollectiveTimeoutError, match=r"rank 2 waited .* for ranks \[3\]"):
        group[2].relay()


@pytest.mark.parametrize(("nodes", "name"), [([0, 1], "gather"), ([5, 5], "gather")])
def test_one_node_or_one_rank_on_each_is_the_exchange_between_nodes(nodes, name):
    assert [channel.exchange.name for channel in channels(nodes)] == [name] * 2


def test_the_usual_exchange_between_nodes_is_that_of_the_method():
    assert channels(PAIRS)[0].exchange.name == "hierarchical:gather"
    linear = ef.ErrorFeedback(ef.RandomK(0.1))
    assert channels(PAIRS, linear)[0].exchange.name == "hierarchical:reduce"


@pytest.mark.parametrize(
    ("exchange", "message"),
    [
        ("hierarchical:dense", "got exchange='hierarchical:dense', expected one between nodes"),
        ("hierarchical:hierarchical", "expected one between nodes"),
        ("hierarchical:ring", "got exchange=.hierarchical:ring., .*double_pass.*; write"),
        ("hierarchical:auto", "got exchange='hierarchical:auto', expected one between nodes"),
        ("hierarchical:", "got exchange='hierarchical:', expected one between nodes"),
        ("gather:reduce", "got exchange='gather:reduce', expected 'gather', which has no other"),
    ],
)
def test_what_is_no_exchange_between_nodes_is_refused(exchange, message):
    with pytest.raises(ValueError, match=message):
        exchange_of(exchange)


def test_methods_that_cannot_be_cut_are_refused():
    with pytest.raises(ef.UnsupportedError, match="got exchange='hierarchical' with PowerSGD"):
        choose("hierarchical", ef.PowerSGD(rank=2))
    message = "got exchange='hierarchical:reduce' with .*TopK.*that can be summed; write"
    with pytest.raises(ef.UnsupportedError, match=message):
        choose("hierarchical:reduce", TOP)


def test_groups_follow_from_the_nodes():
    assert groups_of([0, 0]) is None
    assert groups_of([0, 1, 2]) is None
    assert groups_of([7, 8, 7, 8]) == ([[0, 2], [1, 3]], [[0, 1], [2, 3]])
    unequal = groups_of(UNEQUAL)
    assert unequal == ([[0, 1], [2], [3, 4, 5]], [[0, 2, 3]])
    assert unequal.all == [[0, 1], [3, 4, 5], [0, 2, 3]]


def test_unequal_nodes_have_to_be_in_a_row_for_horovod():
    in_turn = [Place(0, 2, 0), Place(0, 1, 1), Place(1, 2, 0)]
    with pytest.raises(ef.UnsupportedError, match="expected the ranks of each node in a row; plac"):
        nodes_of(in_turn)


def test_simulation_of_nodes_reaches_the_optimum_and_counts_bytes_between_them():
    targets = np.random.default_rng(0).normal(size=(4, 256))
    options = dict(steps=300, step_size=0.1, workers=4, exchange="hierarchical")
    run = ef.simulate(
        ef.EF21(ef.TopK(ratio=0.25)), lambda i, x, t: x - targets[i], np.zeros(256),
        ranks_per_node=2, **options,
    )  # fmt: skip
    np.testing.assert_allclose(run.x, targets.mean(0), atol=1e-3)
    assert run.bytes_sent == 300 * ef.TopK(ratio=0.25).nbytes(128)
    assert [len(states) for states in run.states] == [1] * 4


@pytest.mark.parametrize("ranks_per_node", [3, 8])
def test_simulation_of_nodes_that_are_unequal_is_refused(ranks_per_node):
    with pytest.raises(ValueError, match=f"ranks_per_node={ranks_per_node} with workers=4"):
        ef.simulate(
            TOP, lambda i, x, t: x, np.zeros(100), workers=4, steps=1, step_size=0.1,
            exchange="hierarchical", ranks_per_node=ranks_per_node,
        )  # fmt: skip


def test_simulation_of_nodes_over_ranks_is_refused():
    with pytest.raises(ef.UnsupportedError, match="expected none, because nodes are pretended"):
        ef.simulate(
            TOP, lambda i, x, t: x, np.zeros(100), workers=2, steps=1, step_size=0.1,
            exchange="hierarchical", transport=local_group(1)[0],
        )  # fmt: skip
