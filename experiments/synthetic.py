"""Made-up regression problems of the papers on smoothness that differs among workers."""

from __future__ import annotations

import numpy as np

from ef_horovod import theory


def spread_problem(seed: int, workers: int, d: int, rows: int, L_var: float) -> theory.Problem:
    """f_i = ||A_i x - b_i||^2 / rows + sum_j x_j^2 / (1 + x_j^2), A_i scaled by exp(s z_i).

    A, b and z are standard normal. s >= 0 is the one at which the L_i have the wished variance:
    all that changes with L_var is the scale of the same matrices. L_var = 0 is s = 0, where the
    L_i differ by chance alone.

    Args:
        seed: of the draws.
        workers: n.
        d: number of features.
        rows: of each A_i.
        L_var: wished variance of the L_i.
    """
    rng = np.random.default_rng(seed)
    A = np.sqrt(2) * rng.normal(size=(workers, rows, d))  # the loss of Problem is half a square
    b = np.sqrt(2) * rng.normal(size=(workers, rows))
    z = rng.normal(size=workers)
    norms = np.array([theory.gram_norm([a], [1 / rows]) for a in A])
    low, high = 0.0, 5.0 if L_var else 0.0
    for _ in range(60):
        s = (low + high) / 2
        if np.var(norms * np.exp(2 * s * z)) < L_var:
            low = s
        else:
            high = s
    scaled = A * np.exp(high * z)[:, None, None]
    shards = [theory.Shard(a, y) for a, y in zip(scaled, b, strict=True)]
    return theory.Problem(shards, "squares", "nonconvex", 1.0)


def rare_problem(seed: int, workers: int, owned: int, spread: float) -> theory.Problem:
    """Least squares where each worker owns a few features and each feature has two owners.

    Worker i owns `owned` features in a row from i * owned / 2 on, round the end, so there are
    workers * owned / 2 features; A_i has 2 * owned rows and a scale of exp(spread z_i).

    Args:
        seed: of the draws.
        workers: n.
        owned: r, even.
        spread: of the scales' logarithms.
    """
    rng = np.random.default_rng(seed)
    d = workers * owned // 2
    shards = []
    for i in range(workers):
        features = np.zeros((2 * owned, d))
        columns = (i * owned // 2 + np.arange(owned)) % d
        scale = np.exp(spread * rng.normal())
        features[:, columns] = scale * rng.normal(size=(2 * owned, owned))
        shards.append(theory.Shard(features, rng.normal(size=2 * owned)))
    return theory.Problem(shards, "squares", "none", 0.0)
