"""DoubleSqueeze in plain NumPy, line by line as Algorithm 1 of the paper has it.

Tang, Lian, Yu, Zhang, Liu (ICML 2019). Nothing of the library's methods, channels or server is in
here; of its compressors only the 1-bit operator, whose scale is a sum in an order of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import ef_horovod as ef

SHAPES = {"first": (40, 60), "bias": (60,), "second": (60, 50), "third": (1200, 2)}
Vectors = dict[str, np.ndarray]


class Training(NamedTuple):
    method: ef.Method
    Q: Callable[[np.ndarray], np.ndarray]
    steps: int = 12
    rate: np.float32 = np.float32(0.1)


def top(share: float, v: np.ndarray) -> np.ndarray:
    """Q: the largest entries of v, zeros elsewhere; of equal ones the first."""
    kept = np.argsort(-np.abs(v), kind="stable")[: max(1, int(share * v.size))]
    q = np.zeros_like(v)
    q[kept] = v[kept]
    return q


def one_bit(v: np.ndarray) -> np.ndarray:
    return ef.OneBit().compress(v).decompress()


TRAININGS = {
    "topk": Training(ef.DoubleSqueeze(ef.TopK(0.01), ef.TopK(0.01)), lambda v: top(0.01, v)),
    "onebit": Training(ef.DoubleSqueeze(ef.OneBit(), ef.OneBit()), one_bit),
}


def gradients_of(worker: int, step: int, x: Vectors) -> Vectors:
    """g_i: noise around a target that differs between workers; depends on x."""
    rng = np.random.default_rng((worker, step))
    return {
        name: (x[name] - np.float32(1 + worker) + rng.standard_normal(shape, np.float32))
        for name, shape in SHAPES.items()
    }


def train(training: Training, workers: int) -> Vectors:
    """x after all steps; vectors and what has less than 1024 entries are not compressed."""
    n, Q = workers, training.Q
    x = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    delta_i = [{name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}] * n
    delta = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    for t in range(training.steps):
        g = [gradients_of(i, t, x) for i in range(n)]
        for name, shape in SHAPES.items():
            if len(shape) == 1:
                x[name] = x[name] - training.rate * (sum(g_i[name] for g_i in g) / np.float32(n))
                continue
            v_i = [g[i][name] + delta_i[i][name] for i in range(n)]
            q_i = [Q(v.reshape(-1)).reshape(shape) for v in v_i]
            delta_i = [{**delta_i[i], name: v_i[i] - q_i[i]} for i in range(n)]
            v = sum(q_i) / np.float32(n) + delta[name]
            q = Q(v.reshape(-1)).reshape(shape)
            delta[name] = v - q
            x[name] = x[name] - training.rate * q
    return x
