"""Minimisers of the convex problems, to measure distances from."""

from __future__ import annotations

import numpy as np

from ef_horovod import theory
from experiments.errors import Refused


def minimiser(problem: theory.Problem, tolerance: float = 1e-12) -> np.ndarray:
    """x* of logistic regression with the l2 regulariser, by Newton's method: float64[d].

    Raises:
        ArithmeticError: it did not converge.
    """
    d = problem.features[0].shape[1]
    x = np.zeros(d)
    for _ in range(100):
        gradient = problem.mean_gradient(x)
        if np.linalg.norm(gradient) < tolerance:
            return x
        hessian = problem.lam * np.eye(d)
        for features in problem.features:
            s = features @ x
            weights = 1 / (4 * np.cosh(s / 2) ** 2)
            hessian += (
                features.T @ (weights[:, None] * features) / (len(features) * len(problem.features))
            )
        x = x - np.linalg.solve(hessian, gradient)
    raise Refused(
        f"Newton's method has ||grad f|| = {np.linalg.norm(gradient):.1e} after 100 steps, "
        f"expected {tolerance:g}; the problem is not strongly convex"
    )
