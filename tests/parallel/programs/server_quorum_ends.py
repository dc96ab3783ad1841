"""Worker 0 ends while answers of rounds that it missed, a megabyte each, are on their way to it."""

from __future__ import annotations

import numpy as np
from common import report

import ef_horovod as ef
from ef_horovod.server import Worker

LENGTH, LATER = 300_000, 10

with Worker([np.zeros(LENGTH, np.float32)], ef.NoFeedback(ef.Identity())) as worker:
    ones = [np.ones(LENGTH, np.float32)]
    worker.rounds(ones)
    worker.transport.barrier("both have begun")
    for _ in range(LATER if worker.rank else 0):
        worker.rounds(ones)
    worker.transport.barrier("worker 1 has ended")
    report(worker.rank, {"rounds": worker.step})
