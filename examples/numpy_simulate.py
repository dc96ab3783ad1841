"""Ten workers in one process, without Horovod: what does a method need to reach the optimum?

    pip install scikit-learn    # for the digits
    python examples/numpy_simulate.py

Each worker has its own part of the digits, sorted by class, so that workers disagree; together
they fit a linear model by least squares. Payloads are real, their bytes are counted.
"""

import numpy as np
from sklearn.datasets import load_digits  # pip install scikit-learn

import ef_horovod as ef

WORKERS, STEPS = 10, 1500

digits = load_digits()
order = np.argsort(digits.target, kind="stable")[: 1797 // WORKERS * WORKERS]
features = digits.data[order] / 16
wanted = np.eye(10)[digits.target[order]]
parts = np.arange(len(order)).reshape(WORKERS, -1)
L2 = 0.1


def gradient(worker: int, weights: np.ndarray, step: int) -> np.ndarray:
    a, b = features[parts[worker]], wanted[parts[worker]]
    return a.T @ (a @ weights - b) / len(a) + L2 * weights


def gap(weights: np.ndarray) -> dict[str, float]:
    """Relative distance to the optimum, which least squares lets us compute."""
    return {"gap": float(np.linalg.norm(weights - optimum) / np.linalg.norm(optimum))}


hessian = features.T @ features / len(order) + L2 * np.eye(64)
optimum = np.linalg.solve(hessian, features.T @ wanted / len(order))

for method in (
    ef.NoFeedback(ef.Identity()),
    ef.NoFeedback(ef.TopK(ratio=0.02)),
    ef.ErrorFeedback(ef.TopK(ratio=0.02)),
    ef.EF21(ef.TopK(ratio=0.02)),
    ef.EF21(ef.OneBit()),
):
    run = ef.simulate(
        method,
        gradient,
        np.zeros((64, 10)),
        workers=WORKERS,
        steps=STEPS,
        step_size=0.1,
        observe=gap,
    )
    print(f"{method!r:60} gap {run.history[-1]['gap']:.1e}, {run.bytes_sent:>11,} bytes a worker")
