"""Ranks in one process: results, byte counts, waits that end, and collectives started twice."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from ef_horovod.errors import CollectiveTimeoutError, ConfigMismatchError, UnsupportedError
from ef_horovod.transports.local import local_group


def test_allgather_gives_all_buffers_in_rank_order():
    group = local_group(3)
    waits = [
        endpoint.allgather("a", np.full(endpoint.rank + 1, endpoint.rank, np.uint8))
        for endpoint in group
    ]
    for wait in waits:
        assert [part.tolist() for part in wait()] == [[0], [1, 1], [2, 2, 2]]
    assert [endpoint.bytes_sent for endpoint in group] == [2, 4, 6]
    assert [endpoint.bytes_received for endpoint in group] == [5, 4, 3]


@pytest.mark.parametrize("array", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_allreduce_sums_in_the_framework_of_its_input(array):
    group = local_group(3)
    inputs = [array([1.0, 2.0, float(endpoint.rank)]) for endpoint in group]
    inputs = [x.astype(np.float32) if isinstance(x, np.ndarray) else x.float() for x in inputs]
    waits = [endpoint.allreduce("a", x) for endpoint, x in zip(group, inputs, strict=True)]
    for wait, x in zip(waits, inputs, strict=True):
        total = wait()
        assert type(total) is type(x)
        assert total.dtype == x.dtype
        assert total.tolist() == [3, 6, 3]
    assert [endpoint.bytes_sent for endpoint in group] == [2 * 2 * 12 // 3] * 3


def test_allreduce_gives_every_rank_the_same_bits_and_memory_of_its_own():
    group = local_group(3)
    values = [np.float32([1e8]), np.float32([1]), np.float32([-1e8])]
    waits = [endpoint.allreduce("a", x) for endpoint, x in zip(group, values, strict=True)]
    totals = [wait() for wait in waits]
    assert [total.tolist() for total in totals] == [[0.0]] * 3  # (1e8 + 1) - 1e8 in rank order
    totals[0][0] = 5
    assert totals[1][0] == 0
    assert values[0][0] == np.float32(1e8)


def test_sums_of_unequal_lengths_are_refused():
    """NumPy would repeat a single number."""
    a, b = local_group(2)
    waits = [a.allreduce("x", np.ones(3, np.float32)), b.allreduce("x", np.ones(1, np.float32))]
    for wait in waits:
        with pytest.raises(
            ConfigMismatchError, match=r"ranks have \[1, 3\] numbers in the sum 'x'"
        ):
            wait()


def test_what_is_sent_may_be_overwritten_at_once():
    a, b = local_group(2)
    data, values = np.ones(2, np.uint8), np.ones(2, np.float32)
    gathered, reduced = a.allgather("g", data), a.allreduce("r", values)
    data[:], values[:] = 9, 9
    b.allgather("g", data)
    b.allreduce("r", values)
    assert [part.tolist() for part in gathered()] == [[1, 1], [9, 9]]
    assert reduced().tolist() == [10, 10]


def test_collectives_are_matched_by_name_and_kind():
    a, b = local_group(2)
    waits = [a.allgather(name, np.frombuffer(name.encode(), np.uint8)) for name in ("x", "yy")]
    total = a.allreduce("x", np.ones(1, np.float32))
    b.allreduce("x", np.ones(1, np.float32))
    for name in ("yy", "x"):
        b.allgather(name, np.frombuffer(name.upper().encode(), np.uint8))
    assert [b"".join(part.tobytes() for part in wait()) for wait in waits] == [b"xX", b"yyYY"]
    assert total().tolist() == [2]


def test_a_name_can_be_used_again_once_all_ranks_used_it():
    a, b = local_group(2)
    for step in range(3):
        wait = a.allgather("again", np.full(1, step, np.uint8))
        b.allgather("again", np.full(1, 10 + step, np.uint8))
        assert [part.tolist() for part in wait()] == [[step], [10 + step]]


def test_a_collective_started_twice_is_refused():
    a, b = local_group(2)
    a.allgather("bucket", np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match="rank 0 started 'allgather.bucket' twice"):
        a.allgather("bucket", np.zeros(1, np.uint8))
    b.allgather("bucket", np.zeros(1, np.uint8))


def test_a_wait_ends_and_names_the_missing_ranks():
    group = local_group(4, timeout=0.05)
    group[2].allgather("bucket", np.zeros(1, np.uint8))
    wait = group[0].allgather("bucket", np.zeros(1, np.uint8))
    message = r"rank 0 waited 0.05 s in 'allgather.bucket' for ranks \[1, 3\]"
    with pytest.raises(CollectiveTimeoutError, match=message):
        wait()
    with pytest.raises(TimeoutError, match=r"for ranks \[0, 1, 2\]"):
        group[3].barrier("end")


def test_threads_meet():
    group, results = local_group(3, timeout=10), {}

    def work(endpoint):
        endpoint.barrier("begin")
        results[endpoint.rank] = endpoint.allreduce("s", np.ones(2, np.float32))().tolist()

    threads = [threading.Thread(target=work, args=(endpoint,)) for endpoint in group]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == {rank: [3, 3] for rank in range(3)}


@pytest.mark.parametrize("dtype", [np.float16, np.int32, np.uint8])
def test_only_wide_floats_are_summed(dtype):
    with pytest.raises(UnsupportedError, match="expected float32 or float64"):
        local_group(1)[0].allreduce("a", np.ones(2, dtype))


def test_bfloat16_is_not_summed():
    with pytest.raises(UnsupportedError, match="bfloat16"):
        local_group(1)[0].allreduce("a", torch.ones(2, dtype=torch.bfloat16))


@pytest.mark.parametrize(("size", "timeout"), [(0, 1.0), (-1, 1.0), (2, 0.0), (2, -1.0)])
def test_impossible_groups_are_refused(size, timeout):
    with pytest.raises(ValueError, match="expected at least 1|positive number of seconds"):
        local_group(size, timeout)


def test_one_rank_alone():
    (alone,) = local_group(1)
    assert alone.allgather("a", np.arange(3, dtype=np.uint8))()[0].tolist() == [0, 1, 2]
    assert alone.allreduce("a", np.ones(1))().tolist() == [1]
    assert (alone.bytes_sent, alone.bytes_received) == (0, 0)
