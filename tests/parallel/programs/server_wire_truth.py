"""Bytes by the workers' count and by the kernel's, for methods with servers, a job for each."""

from __future__ import annotations

import numpy as np
from common import ARGUMENTS, report
from loopback import ELEMENTS, compare
from meeting import meet

import ef_horovod as ef
from ef_horovod.server import ServerTransport, Worker

METHODS = {
    "dense": ef.NoFeedback(ef.Identity()),
    "onebit": ef.DoubleSqueeze(ef.OneBit(), server_compressor=ef.OneBit()),
    "topk": ef.DoubleSqueeze(ef.TopK(ratio=0.05), server_compressor=ef.TopK(ratio=0.05)),
}


def counts_of(name: str) -> tuple[int, dict[str, float]]:
    """This worker's rank, and the counts."""
    zeros, transport = [np.zeros(ELEMENTS, np.float32)], ServerTransport()
    worker = Worker(zeros, METHODS[name], dense=lambda name, array: False, transport=transport)
    gradient = np.random.default_rng(worker.rank).standard_normal(ELEMENTS, np.float32)

    def train(steps: int) -> None:
        for _ in range(steps):
            worker.push_pull([gradient])

    def counted() -> int:
        total = worker.stats()[-1]
        return total.bytes_out + total.bytes_in

    def together() -> None:
        transport.allgather("together", np.zeros(1, np.uint8))()

    found = compare(together, train, counted)
    worker.close()
    return worker.rank, found


meet()
results = {}
for name in ARGUMENTS:
    rank, results[name] = counts_of(name)
report(rank, results)
