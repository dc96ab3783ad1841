"""Bytes by the workers' count and by the kernel's, for one method with parameter servers."""

from __future__ import annotations

import numpy as np
from common import ARGUMENTS
from loopback import ELEMENTS, compare

import ef_horovod as ef
from ef_horovod.server import Worker

METHODS = {
    "dense": ef.NoFeedback(ef.Identity()),
    "onebit": ef.DoubleSqueeze(ef.OneBit(), server_compressor=ef.OneBit()),
    "topk": ef.DoubleSqueeze(ef.TopK(ratio=0.05), server_compressor=ef.TopK(ratio=0.05)),
}


def main() -> None:
    zeros = [np.zeros(ELEMENTS, np.float32)]
    worker = Worker(zeros, METHODS[ARGUMENTS[0]], dense=lambda name, array: False)
    gradient = np.random.default_rng(worker.rank).standard_normal(ELEMENTS, np.float32)

    def train(steps: int) -> None:
        for _ in range(steps):
            worker.push_pull([gradient])

    def counted() -> int:
        total = worker.stats()[-1]
        return total.bytes_out + total.bytes_in

    def meet() -> None:
        worker.transport.allgather("meet", np.zeros(1, np.uint8))()

    compare(worker.rank, meet, train, counted)


main()
