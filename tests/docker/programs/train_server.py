"""Trains with a parameter server, in steps as slow as those of a larger model.

train_server.py STEPS SECONDS_PER_STEP
"""

import sys
import time

import numpy as np
from digest import require_equal

import ef_horovod as ef
from ef_horovod.server import Worker


def gather(transport, text):
    """One text of each worker, by the transport that programs may use among the workers."""
    parts = transport.allgather("digest", np.frombuffer(text.encode(), np.uint8))()
    return [part.tobytes().decode() for part in parts]


STEPS, SECONDS = int(sys.argv[1]), float(sys.argv[2])

w = np.zeros((200, 100), np.float32)
truth = np.random.default_rng(0).standard_normal(w.shape, np.float32)
with Worker(
    {"w": w}, ef.DoubleSqueeze(ef.TopK(ratio=0.01), server_compressor=ef.TopK(ratio=0.01))
) as worker:
    own = np.random.default_rng(1 + worker.rank)  # each worker has its own data
    for step in range(1, STEPS + 1):
        x = own.standard_normal((256, 200), np.float32)
        w -= 0.01 * worker.push_pull({"w": x.T @ (x @ (w - truth)) / 256})["w"]
        if worker.rank == 0:
            print(f"step {step}.", flush=True)
        time.sleep(SECONDS)
    require_equal([w], lambda digest: gather(worker.transport, digest), worker.rank)
