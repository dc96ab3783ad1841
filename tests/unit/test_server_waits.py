"""What a server limits: what some workers have begun and others have not, and nothing else."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from ef_horovod.errors import CollectiveTimeoutError
from ef_horovod.server.plan import BucketSpec
from ef_horovod.server.rounds import ServedBucket
from ef_horovod.server.saves import Saves
from ef_horovod.server.server import Server


def server_of(happens_after: float, **fields: Any) -> tuple[Server, list[str]]:
    """A server of two workers, without MPI, to which something happens after so many seconds."""
    server, said, due = object.__new__(Server), [], time.monotonic() + happens_after
    bucket = ServedBucket(0, BucketSpec("w", 5, "EF21(OneBit())", 0), 2, 7)
    bucket.round = 3
    everything = {
        "timeout": 0.2, "_fingerprint": 7, "_configs": {0: None, 1: None}, "buckets": {0: bucket},
        "_saves": Saves(None, 0, 2, said.append), "_present": {0, 1}, "_participation": None,
        "_group": SimpleNamespace(workers=[1, 2], number=0), "_met_at": time.monotonic(),
        "_say": said.append, "_progress": lambda: time.monotonic() > due,
    }  # fmt: skip
    vars(server).update(everything | fields)
    return server, said


@pytest.mark.parametrize(
    ("fields", "what"),
    [({}, "round 3"), ({"_fingerprint": 0, "_configs": {}}, "its first step")],
)
def test_a_pause_of_all_workers_has_no_limit_and_is_said_once(fields: dict, what: str) -> None:
    server, said = server_of(1.0, **fields)
    begin = time.monotonic()
    server._wait_for_anything()
    assert time.monotonic() - begin >= 0.95  # its second began in server_of
    assert len(said) == 1
    assert said[0].startswith(f"no worker has begun {what} for 0.2 s; this server goes on waiting")
    assert "worker.transport.barrier(name)" in said[0]


def test_a_round_that_has_begun_has_its_limit_from_its_first_message_on() -> None:
    server, said = server_of(30.0)
    bucket = server.buckets[0]
    bucket._keep(1, None)  # type: ignore[arg-type]
    bucket._arrivals[1] -= 0.1  # half of the limit ago
    begin = time.monotonic()
    with pytest.raises(CollectiveTimeoutError, match=r"workers \[0\] to send 'w' in round 3; see"):
        server._wait_for_anything()
    assert 0.09 <= time.monotonic() - begin < 5
    assert not said


def test_so_have_a_meeting_and_a_checkpoint() -> None:
    server, _ = server_of(30.0, _fingerprint=0, _configs={1: None})
    with pytest.raises(CollectiveTimeoutError, match=r"workers \[0\] to begin their first step; "):
        server._wait_for_anything()
    server, _ = server_of(30.0)
    server._saves.asked, server._saves.asked_at = {0: 8}, time.monotonic()
    with pytest.raises(CollectiveTimeoutError, match=r"workers \[1\] to ask for a checkpoint of s"):
        server._wait_for_anything()
