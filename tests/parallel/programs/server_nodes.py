"""Workers that sum within their node before a server hears them; facts for the tests.

Jobs one after the other, on ranks of which the first two are servers.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np
from common import OUT, error_of, report
from meeting import meet
from mpi4py import MPI
from server_nodes_gradients import BAD, LIMIT, METHODS, SHAPES, STEPS, gradient

from ef_horovod.server import Server, ServerTransport, Worker
from ef_horovod.transports.mpi import MPITransport

SERVERS = 2
EQUAL, UNEQUAL = [0, 0, 2, 2], [0, 1, 1, 1]  # of each worker: the first one on its node
RANK = MPI.COMM_WORLD.rank


def gradients(worker, step):
    return {name: gradient(worker, step, name) for name in SHAPES}


def place(nodes):
    MPITransport._first_ranks = lambda self: nodes


def open_worker(method=METHODS[0], exchange="hierarchical:server", **options):
    like = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    # A bucket for w, one for v.
    return Worker(like, method, exchange=exchange, seed=3, bucket_bytes=33_000, **options)


def steps(worker, first, last, bad=None):
    """Where the steps lead from zero."""
    x = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    for step in range(first, last):
        given = gradients(worker.rank, step)
        if step == bad and worker.rank == worker.size - 1:
            given["w"][5, 7] = np.nan  # of the last slice
        directions = worker.push_pull(given)
        for name in x if directions is not None else ():
            x[name] -= directions[name]
    return x


def as_text(x):
    return {name: value.tobytes().hex() for name, value in x.items()}


def trained(nodes, method, bad=None):
    place(nodes)
    with open_worker(method, timeout=60) as worker:
        end = as_text(steps(worker, 0, STEPS, bad))
        rows = {row.name: row for row in worker.stats()}
        facts = {"skipped": rows["total"].skipped, "exchange": rows["bucket.1"].exchange}
        facts |= {"out": rows["bucket.1"].bytes_out, "dense": rows["bucket.1"].dense_bytes_out}
        return {"end": end, **facts}


def first_half():
    place(EQUAL)
    with open_worker(METHODS[1]) as worker:
        steps(worker, 0, 2)
        return worker.checkpoint(), as_text(steps(worker, 2, STEPS))


def second_half(state):
    with open_worker(METHODS[1], state=state) as worker:
        return as_text(steps(worker, 2, STEPS))


def disagree():
    """Worker 1 has another exchange."""
    transport = ServerTransport(LIMIT)
    exchange = "server" if transport.rank == 1 else "hierarchical:server"
    error = error_of(lambda: open_worker(exchange=exchange, transport=transport))
    transport.close()
    return error


def with_quorum():
    transport = ServerTransport(LIMIT)
    error = error_of(lambda: open_worker(transport=transport))
    transport.close()
    return error


def silent(workers, seconds):
    """Some workers stay away from step 1."""
    worker = open_worker(timeout=LIMIT)
    steps(worker, 0, 1)
    begin = time.monotonic()
    if worker.rank in workers:
        time.sleep(seconds)
    error = error_of(lambda: steps(worker, 1, 2))
    worker.transport.close(error)
    return {"seconds": time.monotonic() - begin, "error": error}


def serve(**options):
    def say(line):
        print(f"ef_horovod.server: {line}", file=sys.stderr, flush=True)

    return error_of(lambda: Server(say=say, **{"timeout": 60, **options}).run())


def job(name, found, work, **options):
    meet()
    found[name] = serve(**options) if RANK < SERVERS else work()


def main():
    found, kept = {}, {}
    for method in METHODS:
        job(repr(method), found, lambda method=method: trained(EQUAL, method, BAD))
    job("plain", found, lambda: trained([0, 1, 2, 3], METHODS[0]))
    job("no drop", found, lambda: trained(EQUAL, METHODS[0]))
    job("unequal", found, lambda: trained(UNEQUAL, METHODS[-1]))
    folder = OUT / "servers"
    job("first half", kept, first_half, checkpoint=folder)
    job("second half", kept, lambda: second_half(kept["first half"][0]), checkpoint=folder)
    if RANK >= SERVERS:
        found["resumed"] = kept["first half"][1] == kept["second half"]
    job("disagree", found, disagree, timeout=LIMIT)
    job("quorum", found, with_quorum, quorum=2)
    job("one silent", found, lambda: silent([3], LIMIT + 1), timeout=LIMIT)
    job("node silent", found, lambda: silent([2, 3], LIMIT + 2.5), timeout=LIMIT)
    meet()
    report(RANK, found)
    # After a wait that passed its limit, a worker aborts the job at its exit. Here all came back.
    MPI.Finalize()
    os._exit(0)


main()
