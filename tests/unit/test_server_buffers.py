"""Memory that MPI is still sending is not written to, by workers nor by servers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ef_horovod.server.asked import AskedBucket
from ef_horovod.server.client import ServerTransport
from ef_horovod.server.inbox import Inbox
from ef_horovod.server.plan import BucketSpec
from ef_horovod.server.server import Server


class Request:
    """Complete when it has been asked for three times."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.before, self.polls = data, data.copy(), 0

    def Test(self, status: Any = None) -> bool:
        if self.polls < 3:
            assert np.array_equal(self.data, self.before), "it was written to while it was sent"
        self.polls += 1
        return self.polls >= 3


class SlowComm:
    """Stands in for a communicator whose messages take long."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def Isend(self, data: list[Any], rank: int, tag: int) -> Request:
        self.requests.append(Request(data[0]))
        return self.requests[-1]

    def Irecv(self, data: list[Any], rank: int, tag: int) -> Any:
        return None

    def Improbe(self, *_: Any) -> None:
        return None


def test_a_worker_sends_the_next_message_when_the_last_one_has_left() -> None:
    comm, transport = SlowComm(), object.__new__(ServerTransport)
    bucket = AskedBucket(0, BucketSpec("w", 100, "EF21(OneBit())", 0))
    bucket.open(server=0)
    fields = {
        "_all": comm, "_broken": None, "_closed": False, "_config": 1, "_fingerprint": 7,
        "_index": {"w": 0}, "_buckets": [bucket], "_sends": [], "rank": 0, "timeout": 5.0,
        "bytes_sent": 0,
    }  # fmt: skip
    vars(transport).update(fields)
    for step in range(3):
        transport.ask("w", np.full(50, step, np.uint8), step)
    assert [request.polls >= 3 for request in comm.requests] == [True, True, False]


def test_a_server_writes_the_next_answer_when_the_last_one_has_left() -> None:
    comm, server = SlowComm(), object.__new__(Server)
    inbox, memory = Inbox(comm, lambda *_: None), np.zeros(8, np.uint8)

    def answers() -> Any:
        memory[:] += 1
        yield memory, [0, 1]

    bucket = SimpleNamespace(index=4, spec=SimpleNamespace(name="w"), answers=answers)
    group = SimpleNamespace(workers=[1, 2], number=0)
    vars(server).update(_inbox=inbox, _participation=None, timeout=5.0, _group=group)
    for _ in range(3):
        server._answer_complete(bucket)
    assert [request.polls >= 3 for request in comm.requests] == [True] * 4 + [False] * 2
    assert inbox.has_left(tag=6)
    assert not inbox.has_left(tag=5)


def test_a_bucket_that_mpi_cannot_carry_in_one_message_is_refused() -> None:
    transport = object.__new__(ServerTransport)
    vars(transport).update(_broken=None, _closed=False, _config=None, _index={}, _buckets=[])
    with pytest.raises(TypeError, match="got a bucket 'w' of 300000000 elements, whose messa"):
        transport.open_bucket("w", 300_000_000, "EF21(OneBit())", 0)
