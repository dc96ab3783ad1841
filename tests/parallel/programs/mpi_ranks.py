"""The MPI transport among real ranks, and a channel on it; facts for the tests to judge."""

from __future__ import annotations

import time

import numpy as np
from common import error_of, report
from mpi4py import MPI

import ef_horovod as ef
from ef_horovod.exchange.channel import finish_step
from ef_horovod.exchange.config_check import require_same_config
from ef_horovod.training.choice import choose
from ef_horovod.transports import mpi
from ef_horovod.transports.mpi import MPITransport

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.Get_rank(), COMM.Get_size()


def unequal_sizes(transport):
    own = np.arange(3 * RANK + 1, dtype=np.uint8)
    return [part.tolist() for part in transport.allgather("unequal", own)()]


def any_order(transport):
    """Collectives started in another order on every rank do not mix."""
    names = [f"x{i}" for i in range(4)]
    order = names[RANK % 4 :] + names[: RANK % 4]
    payload = {name: np.full(5, 10 * RANK + i, np.uint8) for i, name in enumerate(names)}
    waits = {name: transport.allgather(name, payload[name]) for name in order}
    return {name: [part.tolist() for part in waits[name]()] for name in names}


def few_tags(_):
    """Tags of an MPI that has four of them, for names with the same checksum too."""
    transport = MPITransport(timeout=20)
    names = ["plumless", "buckeroo", "sum"]  # the first two have the same CRC-32
    payload = {name: np.full(5, 10 * RANK + i, np.uint8) for i, name in enumerate(names)}
    found = []
    for step in range(2):
        order = names[(RANK + step) % 3 :] + names[: (RANK + step) % 3]
        waits = {
            name: transport.allreduce(name, np.float32([RANK]))
            if name == "sum"
            else transport.allgather(name, payload[name])
            for name in order
        }
        parts = {name: [part.tolist() for part in waits[name]()] for name in names[:2]}
        found.append({**parts, "sum": waits["sum"]().tolist()})
    transport.barrier("the fourth")
    known, mpi.largest_tag = mpi.largest_tag, lambda: 4
    too_many = error_of(lambda: transport.barrier("the fifth"))
    mpi.largest_tag = known
    return {
        "found": found,
        "largest": max(transport._tags.values()),
        "too_many": too_many,
        "nobody": error_of(lambda: MPITransport(MPI.COMM_NULL)),
    }


def pieces(transport):
    """Buffers that are longer than what MPI takes in one message, which is made to be 4 bytes."""
    known, mpi.PIECE_NBYTES = mpi.PIECE_NBYTES, 4
    found = []
    for length in (1, 3, 4, 5, 8, 9):
        own = np.full(length + RANK, RANK, np.uint8)
        gathered = transport.allgather("pieces", own)()
        total = transport.allreduce("sum of pieces", np.full(length * SIZE + 1, RANK, "f4"))()
        found.append([[part.tolist() for part in gathered], total.tolist()])
    mpi.PIECE_NBYTES = known
    return found


def sums(transport):
    """Lengths that the ring cannot split evenly, fewer numbers than ranks among them."""
    result = {}
    for length in (0, 1, 2, 5, 1001):
        values = np.random.default_rng(RANK).standard_normal(length).astype(np.float32)
        total = transport.allreduce(f"sum{length}", values.copy())()
        everyone = COMM.allgather(values.astype(np.float64))
        result[length] = {
            "error": float(np.abs(total - sum(everyone)).max(initial=0)),
            "bytes": total.tobytes().hex(),
        }
    return result


def refused(transport):
    half = np.ones(2, np.float16)
    pending = transport.allgather("twice", np.zeros(1, np.uint8))
    twice = error_of(lambda: transport.allgather("twice", np.zeros(1, np.uint8)))
    pending()
    return {"float16": error_of(lambda: transport.allreduce("h", half)), "twice": twice}


def training(transport):
    """A channel over MPI on a quadratic: what `ef.simulate` computes in one process."""
    targets = np.random.default_rng(3).standard_normal((SIZE, 300)).astype(np.float32)
    ends = {}
    for method in (ef.EF21(ef.TopK(ratio=0.1)), ef.ErrorFeedback(ef.RandomK(0.2, shared=False))):
        x = np.zeros(300, np.float32)
        channel = choose("auto", method).open("", x, method, transport, seed=11)
        for step in range(40):
            channel.gradient[:] = x - targets[RANK]
            channel.start(step)
            (direction,) = finish_step([channel])
            x = x - np.float32(0.2) * direction
        run = ef.simulate(
            method,
            lambda i, x, step: x - targets[i],
            np.zeros(300, np.float32),
            workers=SIZE,
            steps=40,
            step_size=np.float32(0.2),
            seed=11,
        )
        ends[repr(method)] = {
            "same": bool(np.array_equal(x, run.x)),
            "bytes": [channel.stats().bytes_out, run.bytes_sent],
        }
    return ends


def disagreement(transport):
    facts = [*(f"same {i} {'x' * 90}" for i in range(1000)), f"mine {RANK // 2}"]  # over 64 KiB
    return error_of(lambda: require_same_config(transport, facts, "g"))


def unequal_sums(_):
    """Every rank's left neighbour has another length."""
    transport = MPITransport(timeout=20)
    values = np.ones((10 + RANK) * SIZE, np.float32)
    return error_of(lambda: transport.allreduce("sum", values)())


def missing_rank(_):
    transport = MPITransport(timeout=1.5)
    begin = time.monotonic()
    if RANK == SIZE - 1:
        time.sleep(4)
        return {}
    gather = error_of(lambda: transport.allgather("late", np.zeros(4, np.uint8))())
    reduce = error_of(lambda: transport.allreduce("sum", np.zeros(10, np.float32))())
    again = error_of(lambda: transport.allgather("late", np.zeros(4, np.uint8)))
    seconds = time.monotonic() - begin
    return {"gather": gather, "reduce": reduce, "again": again, "seconds": seconds}


def main() -> None:
    transport = MPITransport()
    scenarios = [unequal_sizes, any_order, few_tags, pieces, sums, refused, training]
    if SIZE > 1:
        scenarios += [unequal_sums, missing_rank]
    if SIZE > 2:
        scenarios.insert(0, disagreement)
    report(RANK, {scenario.__name__: scenario(transport) for scenario in scenarios})


main()
