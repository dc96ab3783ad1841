"""The torch optimizer with parameter servers: where some methods lead, and what hooks overlap.

Arguments: methods, one job with one optimizer for each: a job with servers has one set of buckets.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from common import ARGUMENTS, error_of, report
from horovod.common.process_sets import global_process_set
from meeting import meet
from same_gradients import SEED, SHAPE, STEPS, digest, gradient

import ef_horovod.torch as ef
from ef_horovod.methods.parsing import read_method

torch.set_num_threads(1)


def run(method):
    x = torch.nn.Parameter(torch.zeros(SHAPE))
    optimizer = ef.DistributedOptimizer(
        torch.optim.SGD([x], lr=1.0),
        [("x", x)],
        compression=read_method(method),
        exchange="server",
        seed=SEED,
    )
    transport = optimizer.transport
    started, skipped, apart = [], [], ""
    for step in range(STEPS + 1):
        optimizer.zero_grad()
        if step in (2, 3):  # a step that is left out, averaged or under way
            (100 * x).sum().backward()
            if step == 2:
                optimizer.synchronize()
            optimizer.discard()
        g = torch.from_numpy(gradient(transport.rank, min(step, STEPS - 1)))
        if step == STEPS - 1 and transport.rank == 0:
            g = g * np.nan  # dropped everywhere; the last gradient comes again in the next step
        (x * g).sum().backward()
        started.append(optimizer._engine.buckets[0].started)
        if step == 0 and transport.size > 1:
            with torch.no_grad():
                x.fill_(transport.rank)
                apart = error_of(optimizer.step)
                x.zero_()
        optimizer.step()
        skipped.append(optimizer.step_skipped)
    result = {
        "x": digest(x.detach().numpy()),
        "overlap": started[1:],
        "skipped": skipped,
        "apart": apart,
        "process_set": error_of(
            lambda: ef.DistributedOptimizer(
                torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0),
                exchange="server",
                process_set=global_process_set,
            )
        ),
        "second": error_of(
            lambda: ef.DistributedOptimizer(
                torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0), exchange="server"
            )
        ),
    }
    transport.close()
    begin = time.monotonic()
    closed = error_of(lambda: ((x * g).sum().backward(), optimizer.step()))
    result["closed"] = closed if time.monotonic() - begin < 2 else f"late: {closed}"
    return transport.rank, result


def main() -> None:
    if len(ARGUMENTS) > 1:  # then so does server_again.py
        meet()
    ends = [run(method) for method in ARGUMENTS]
    report(ends[0][0], {"methods": [result for _, result in ends]})


main()
