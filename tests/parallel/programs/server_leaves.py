"""Workers that end one after the other, with one bucket for all servers."""

from __future__ import annotations

import time

import numpy as np
from common import report

import ef_horovod as ef
from ef_horovod.server import Worker

with Worker([np.zeros(2000, np.float32)], ef.EF21(ef.Identity())) as worker:
    (direction,) = worker.push_pull([np.ones(2000, np.float32)])
    report(worker.rank, {"sum": float(direction.sum())})
    time.sleep(2.0 * worker.rank)
