"""What servers and workers know of nodes, without MPI."""

from __future__ import annotations

import numpy as np
import pytest

import ef_horovod as ef
from ef_horovod.errors import ConfigMismatchError, ProtocolError
from ef_horovod.server import Worker
from ef_horovod.server.plan import BucketSpec, Config, require_agreement
from ef_horovod.server.protocol import Kind, Message, unpack
from ef_horovod.server.quorum import require_quorum
from ef_horovod.server.rounds import ServedBucket
from ef_horovod.training.choice import choose, wants_server
from ef_horovod.transports.nodes import groups_of

D, METHOD = 40, ef.NoFeedback(ef.Identity())
SLICE = BucketSpec("b.slice.1", D, repr(METHOD), 1, (1, 3))


def push(worker: int) -> tuple[Message, np.ndarray]:
    state = METHOD.init(np.zeros(D, np.float32), 2)[0]
    gradient = np.full(D, worker, np.float32)
    payload, _ = METHOD.push(state, gradient, ef.Key(1, 0, 0, worker // 2, 2))
    return Message(Kind.PUSH, worker, 4, 0, 0, 7), payload.data


def test_a_slice_is_reduced_once_its_workers_have_sent_it() -> None:
    bucket = ServedBucket(4, SLICE, 4, 7)
    assert bucket.missing == [1, 3]
    with pytest.raises(ProtocolError, match=r"another worker's slice, expected one of \[1, 3\]"):
        bucket.accept(2, *push(2))
    assert not bucket.accept(3, *push(3))
    assert bucket.missing == [1]
    assert bucket.accept(1, *push(1))
    ((answer, workers),) = bucket.answers()
    assert workers == [1, 3]
    assert np.array_equal(unpack(answer)[1].view(np.float32), np.full(D, 2, np.float32))


def test_configs_tell_exchanges_apart() -> None:
    by_nodes = Config((SLICE, SLICE._replace(name="b.slice.0", workers=(0, 2))))
    assert Config.from_json(by_nodes.to_json()) == by_nodes
    require_agreement([by_nodes] * 4, None)
    plain = Config((SLICE._replace(name="b", workers=()),))
    assert Config.from_json(plain.to_json()) == plain
    with pytest.raises(ConfigMismatchError, match="by nodes .*hierarchical:server.* and worker 1"):
        require_agreement([by_nodes, plain], None)


def test_a_single_node_is_a_group_for_those_outside() -> None:
    assert groups_of([0, 0, 0]) is None
    groups = groups_of([0, 0, 0], one_node=True)
    assert groups is not None
    assert groups.cross == [[0], [1], [2]]
    assert groups_of([0, 1, 2], one_node=True) is None


def test_which_exchanges_ask_servers() -> None:
    asked = ["server", "hierarchical:server"]
    others = [
        "gather",
        "hierarchical",
        "hierarchical:gather",
        "auto",
        "auto:1gbit",
        "nosuch:server",
    ]
    assert all(map(wants_server, asked))
    assert not any(map(wants_server, others))


def test_what_cannot_work_is_refused() -> None:
    like = [np.zeros(2000)]
    with pytest.raises(ValueError, match="Worker got exchange='gather', expected 'server' or"):
        Worker(like, METHOD, exchange="gather")
    with pytest.raises(ef.UnsupportedError, match="got exchange='hierarchical:server' with Power"):
        Worker(like, ef.PowerSGD(rank=2), exchange="hierarchical:server")
    with pytest.raises(ef.UnsupportedError, match="simulate got .*; write exchange='hierarchical'"):
        ef.simulate(
            METHOD, lambda *_: np.zeros(3), np.zeros(3), workers=2, steps=1, step_size=1.0,
            exchange="hierarchical:server",
        )  # fmt: skip
    with pytest.raises(ef.UnsupportedError, match="got a quorum of 2 with .*; leave --quorum out"):
        require_quorum(2, 4, 1, [], by_nodes=True)
    assert choose("hierarchical:server", METHOD).needs_server
