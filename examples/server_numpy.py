"""Linear regression by workers and a parameter server, in NumPy: both ways compressed 50-fold.

launch/server -s 1 -w 4 -- python examples/server_numpy.py
"""

from __future__ import annotations

import numpy as np

import ef_horovod as ef
from ef_horovod.server import Worker

FEATURES, OUTPUTS, ROWS, STEPS = 200, 100, 256, 600


def main() -> None:
    w = np.zeros((FEATURES, OUTPUTS), np.float32)
    method = ef.DoubleSqueeze(ef.TopK(ratio=0.01), server_compressor=ef.TopK(ratio=0.01))
    truth = np.random.default_rng(0).standard_normal((FEATURES, OUTPUTS), np.float32)
    with Worker({"w": w}, method) as worker:
        rng = np.random.default_rng(1 + worker.rank)  # each worker has its own data
        for step in range(STEPS):
            x = rng.standard_normal((ROWS, FEATURES), np.float32)
            gradient = x.T @ (x @ (w - truth)) / ROWS
            directions = worker.push_pull({"w": gradient})
            w -= 0.01 * directions["w"]
            if worker.rank == 0 and step % 100 == 99:
                error = np.linalg.norm(w - truth) / np.linalg.norm(truth)
                print(f"step {step + 1}: distance to the solution {error:.3f}", flush=True)
        total = worker.stats()[-1]
        if worker.rank == 0:
            print(
                f"sent 1/{total.dense_bytes_out / total.bytes_out:.0f} of dense, "
                f"received 1/{total.dense_bytes_out / total.bytes_in:.0f}"
            )


if __name__ == "__main__":
    main()
