"""What goes wrong on nodes with several ranks: how it ends on each rank; facts for the tests."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings

import horovod.torch as hvd
import torch
from common import ARGUMENTS, error_of, report
from torch_common import batches, build_model, train

import ef_horovod.torch as ef

METHOD = ef.ErrorFeedback(ef.TopK(ratio=0.1))
LIMIT = 3.0
SLOW = "auto:64kbit,0us"  # the model is small


def wrap(exchange="hierarchical", **options):
    model = build_model()
    optimizer = ef.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05),
        list(model.named_parameters()),
        compression=METHOD,
        exchange=exchange,
        bucket_bytes=10_000,
        **options,
    )
    return model, optimizer


def steps(model, optimizer, count):
    train(model, optimizer, batches(hvd.rank()), count)


def taken(exchange=SLOW, **options):
    """The exchanges that run, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, optimizer = wrap(exchange, **options)
    steps(model, optimizer, 2)
    names = sorted({row.exchange for row in optimizer.stats()[:-1]})
    return {"names": names, "warned": sorted({str(one.message) for one in caught})}


def timed(action):
    begin = time.monotonic()
    error = error_of(action)
    return {"seconds": time.monotonic() - begin, "error": error}


def partly(process_set):
    """Three of four ranks, of whose groups one exists."""
    if hvd.rank() == 3:
        return {}
    found = timed(lambda: wrap(process_set=process_set))
    return {**found, "auto": taken(process_set=process_set)}


def one_has(exchange):
    return timed(lambda: steps(*wrap(exchange if hvd.rank() == 1 else "hierarchical"), 1))


def one_without():
    """The last rank uses Horovod alone; the others say so."""
    if hvd.rank() < 3:
        return timed(lambda: steps(*wrap(timeout=LIMIT), 1))
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    plain = hvd.DistributedOptimizer(optimizer, list(model.named_parameters()))
    return timed(lambda: steps(model, plain, 1))


def mistakes():
    hvd.init()
    found = {"fixed": taken()}
    hvd.barrier()
    hvd.shutdown()
    hvd.init(process_sets="dynamic")
    three, _ = hvd.add_process_set([0, 1, 2]), hvd.add_process_set([0, 1])
    found["partly"] = partly(three)
    hvd.barrier()
    found["auto"] = taken()
    for exchange in ("gather", SLOW):
        found[f"one {exchange}"] = one_has(exchange)
    found["without"] = one_without()
    report(hvd.rank(), found)


def killed():
    hvd.init(process_sets="dynamic")
    model, optimizer = wrap(timeout=LIMIT)
    steps(model, optimizer, 2)
    if hvd.rank() == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    report(hvd.rank(), timed(lambda: steps(model, optimizer, 3)))
    sys.stderr.flush()


{"mistakes": mistakes, "killed": killed}[ARGUMENTS[0]]()
