"""Smoothness constants of logistic regression and least squares, from the workers' data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Loss = Literal["logistic", "squares"]
Regulariser = Literal["none", "l2", "nonconvex"]

# Largest second derivative of a row's loss by a^T x: of log(1 + exp(-z)), and of z^2 / 2.
_CURVATURE = {"logistic": 0.25, "squares": 1.0}
# Largest second derivative of the regulariser by each x_j: of x^2 / 2, and of x^2 / (1 + x^2).
_PENALTY = {"none": 0.0, "l2": 1.0, "nonconvex": 2.0}


@dataclass(frozen=True)
class Smoothness:
    """Lipschitz constants of the gradients of f = (1/n) sum_i f_i and of each f_i.

    All are in units of gradient per unit of x.

    Args:
        L: of f.
        L_i: of f_1, ..., f_n; any sequence of positive numbers, kept as a tuple.

    Raises:
        ValueError: there is no worker, or a constant is not a finite positive number.

    Example:
        >>> import ef_horovod as ef
        >>> constants = ef.theory.Smoothness(L=25.0, L_i=[1, 1, 1, 100])
        >>> round(constants.L_QM, 4), constants.L_AM
        (50.0075, 25.75)

    References:
        Richtarik, Sokolov, Fatkhullin: EF21 (NeurIPS 2021) for L and L_QM. Richtarik, Gasanov,
        Burlachenko: Error Feedback Reloaded (ICLR 2024) for L_AM and L_var.
    """

    L: float
    L_i: Sequence[float]

    def __post_init__(self) -> None:
        each = tuple(float(number) for number in self.L_i)
        if not each or not all(0 < number < np.inf for number in (*each, self.L)):
            raise ValueError(
                f"Smoothness got L={self.L} and {len(each)} L_i from {min(each, default=None)} to "
                f"{max(each, default=None)}, expected finite positive numbers; leave out workers "
                "whose data are all zero, or regularise"
            )
        object.__setattr__(self, "L", float(self.L))
        object.__setattr__(self, "L_i", each)

    @property
    def n(self) -> int:
        """Number of workers."""
        return len(self.L_i)

    @property
    def L_QM(self) -> float:
        """Quadratic mean of the L_i, sqrt(mean L_i^2): L-tilde in EF21."""
        return float(np.sqrt(np.mean(np.square(self.L_i))))

    @property
    def L_AM(self) -> float:
        """Arithmetic mean of the L_i."""
        return float(np.mean(self.L_i))

    @property
    def L_var(self) -> float:
        """Variance of the L_i: L_QM^2 - L_AM^2."""
        return float(np.var(self.L_i))  # L_QM^2 - L_AM^2 with less rounding

    @property
    def weights(self) -> np.ndarray:
        """float64[n], w_i = L_i / sum_j L_j."""
        return np.array(self.L_i) / np.sum(self.L_i)


def smoothness_constants(
    features: Sequence[np.ndarray],
    loss: Loss,
    regulariser: Regulariser = "none",
    lam: float = 0.0,
    *,
    pooled: bool = True,
) -> Smoothness:
    """L and L_i of the mean loss over each worker's rows.

    L_i = c lambda_max(A_i^T A_i) / N_i + s lam, with N_i rows on worker i, c = 1/4 for `logistic`
    and 1 for `squares`, and s = 0, 1 or 2 for no, the l2 or the nonconvex regulariser. The losses
    are those of `Problem`.

    Args:
        features: float64[N_i, d] of each worker.
        loss: "logistic" is log(1 + exp(-y a^T x)), "squares" is (a^T x - y)^2 / 2.
        regulariser: "l2" is (lam / 2) ||x||^2, "nonconvex" is lam sum_j x_j^2 / (1 + x_j^2).
        lam: its weight, at least 0.
        pooled: L from all rows with equal weight, as in the reference code. False gives each worker
            the same weight, as in (1/n) sum_i f_i. Both are equal if all workers have the same
            number of rows.

    Raises:
        ValueError: a name is unknown, lam is negative, or matrices are empty, not finite or of
            different widths.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> shards = [numpy.eye(2), 3 * numpy.eye(2)]
        >>> ef.theory.smoothness_constants(shards, "logistic", "nonconvex", 0.1).L_i
        (0.325, 1.325)

    References:
        EF21 (NeurIPS 2021), experiments and the authors' code; for squares with loss and gradient
        of the same scale, where that code has a factor 2 between them.
    """
    require_objective(loss, regulariser, lam)
    _require_matrices(features)
    rows = np.array([len(A) for A in features])
    each = [gram_norm([A], [1 / len(A)]) for A in features]
    weights = np.full(len(rows), 1 / rows.sum()) if pooled else 1 / (len(rows) * rows)
    scale, shift = _CURVATURE[loss], _PENALTY[regulariser] * lam
    total = gram_norm(features, weights)
    return Smoothness(scale * total + shift, tuple(scale * norm + shift for norm in each))


def gram_norm(
    features: Sequence[np.ndarray], weights: Sequence[float] | np.ndarray | None = None
) -> float:
    """lambda_max(sum_i w_i A_i^T A_i), from the smaller of the two Gram matrices.

    Args:
        features: float64[N_i, d] each.
        weights: w_i, at least 0; None for ones.

    Raises:
        ValueError: matrices are empty, not finite or of different widths.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> round(ef.theory.gram_norm([numpy.array([[3.0, 4.0]])]), 9)
        25.0
    """
    return max(float(_gram_eigenvalues(features, weights)[-1]), 0.0)  # rounding can give < 0


def pl_constant(
    features: Sequence[np.ndarray],
    loss: Loss,
    regulariser: Regulariser = "none",
    lam: float = 0.0,
) -> float:
    """mu with ||grad f(x)||^2 >= 2 mu (f(x) - f*), if it follows from the data.

    Let M = (1/n) sum_i A_i^T A_i / N_i. `squares` alone: the smallest nonzero eigenvalue of M, for
    any rank. `squares` with l2: the smallest eigenvalue of M plus lam. `logistic` with l2: lam.

    Args:
        features: float64[N_i, d] of each worker.
        loss, regulariser, lam: as for `smoothness_constants`.

    Raises:
        ValueError: as for `smoothness_constants`, or no such constant follows.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> round(ef.theory.pl_constant([numpy.diag([3.0, 2.0, 0.0])], "squares"), 9)
        1.333333333

    References:
        EF21 (NeurIPS 2021) for the condition. Karimi, Nutini, Schmidt: Linear Convergence of
        Gradient and Proximal-Gradient Methods under the Polyak-Lojasiewicz Condition (2016).
    """
    require_objective(loss, regulariser, lam)
    _require_matrices(features)
    added = lam if regulariser == "l2" else 0.0
    if loss == "logistic" and added > 0:
        return float(lam)
    if loss == "squares" and regulariser != "nonconvex":
        mu = added + _smallest_eigenvalue(features, or_nonzero=added == 0)
        if mu > 0:
            return mu
    raise ValueError(
        f"got loss={loss!r}, regulariser={regulariser!r} and lam={lam}, expected 'squares' without "
        "or with l2, on data that are not all zero, or 'logistic' with l2 and lam > 0; take a step "
        "size that needs no mu"
    )


def _smallest_eigenvalue(features: Sequence[np.ndarray], *, or_nonzero: bool) -> float:
    """Smallest eigenvalue of (1/n) sum_i A_i^T A_i / N_i; the smallest nonzero one if asked."""
    rows = np.array([len(A) for A in features])
    size = max(int(rows.sum()), features[0].shape[1])
    eigenvalues = _gram_eigenvalues(features, 1 / (len(rows) * rows))
    tiny = eigenvalues[-1] * size * np.finfo(float).eps  # a zero after rounding
    nonzero = eigenvalues[eigenvalues > tiny]
    if or_nonzero:
        return float(nonzero.min(initial=np.inf)) if nonzero.size else 0.0
    return float(nonzero[0]) if nonzero.size == features[0].shape[1] else 0.0


def require_objective(loss: str, regulariser: str, lam: float) -> None:
    """Raise ValueError unless these name a loss and a regulariser with a weight of at least 0."""
    for what, got, known in (
        ("loss", loss, _CURVATURE),
        ("regulariser", regulariser, _PENALTY),
    ):
        if got not in known:
            raise ValueError(f"got {what}={got!r}, expected one of {tuple(known)}; pick one")
    if not 0 <= lam < np.inf:
        raise ValueError(f"got lam={lam}, expected a finite weight of at least 0; 0.1 is usual")


def _gram_eigenvalues(
    features: Sequence[np.ndarray], weights: Sequence[float] | np.ndarray | None
) -> np.ndarray:
    """Ascending eigenvalues of the smaller Gram matrix of the stacked sqrt(w_i) A_i."""
    _require_matrices(features)
    w = np.ones(len(features)) if weights is None else np.asarray(weights, float)
    width = features[0].shape[1]
    if sum(len(A) for A in features) >= width:  # avoids a stacked copy of the data
        gram = np.zeros((width, width))
        for A, weight in zip(features, w, strict=True):
            gram += weight * (A.T @ A)
    else:
        stacked = np.concatenate([np.sqrt(b) * A for A, b in zip(features, w, strict=True)])
        gram = stacked @ stacked.T
    return np.linalg.eigvalsh(gram)


def _require_matrices(features: Sequence[np.ndarray]) -> None:
    shapes = [np.shape(A) for A in features]
    good = bool(shapes) and all(
        len(shape) == 2 and min(shape) > 0 and shape[1] == shapes[0][-1] for shape in shapes
    )
    if not good or not all(np.all(np.isfinite(A)) for A in features):
        raise ValueError(
            f"got features of shapes {shapes[:4]}, expected a sequence of finite matrices [N_i, d] "
            "with the same d and at least one row; pass one matrix for each worker"
        )
