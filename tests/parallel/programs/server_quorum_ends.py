"""Worker 0 ends while answers of rounds that it missed, a megabyte each, are on their way to it."""

from __future__ import annotations

import time

import numpy as np
from common import report

import ef_horovod as ef
from ef_horovod.server import Worker

LENGTH = 300_000

with Worker([np.zeros(LENGTH, np.float32)], ef.NoFeedback(ef.Identity())) as worker:
    ones = [np.ones(LENGTH, np.float32)]
    for _ in range(10 if worker.rank else 1):
        worker.rounds(ones)
    if worker.rank == 0:
        time.sleep(3)
    report(worker.rank, {"rounds": worker.step})
