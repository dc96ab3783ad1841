"""Rare features: which worker owns which coordinate, and the step sizes that this allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ef_horovod.theory.smoothness import Smoothness
from ef_horovod.theory.steps import require_fraction, xi


class RareFeatures(NamedTuple):
    """How sparsely features are spread over n workers."""

    c: int  # largest number of workers that own one feature, 1 to n
    r: int  # largest number of features that one worker owns, 1 to d
    W: float  # largest total weight of the owners of one feature, in (0, 1]


def supports(features: Sequence[np.ndarray]) -> np.ndarray:
    """Which worker owns which feature: bool[n, d], True if a column of A_i has a nonzero entry.

    Args:
        features: float64[N_i, d] of each worker.

    Raises:
        ValueError: there are no matrices, or their widths differ.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> ef.theory.supports([numpy.array([[1.0, 0.0], [2.0, 0.0]]), numpy.array([[0.0, 3.0]])])
        array([[ True, False],
               [False,  True]])
    """
    widths = {np.shape(A)[1] if np.ndim(A) == 2 else -1 for A in features}
    if len(widths) != 1 or -1 in widths:
        raise ValueError(
            f"got {len(features)} arrays of shapes {[np.shape(A) for A in features][:4]}, expected "
            "matrices [N_i, d] with the same d; pass one for each worker"
        )
    return np.array([np.any(A != 0, axis=0) for A in features])


def rare_features(owned: np.ndarray, L_i: Sequence[float] | None = None) -> RareFeatures:
    """c, r and W of a support matrix.

    c counts the owners of the most common feature, r the features of the largest owner. W = max_j
    sum_{i owns j} w_i with w_i = L_i / sum L.

    Args:
        owned: bool[n, d], from `supports`.
        L_i: smoothness constants of the n workers, positive; None for equal ones, so that W = c/n.

    Raises:
        ValueError: `owned` is not a matrix or has no True entry, or there is not one L_i for each
            worker.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> owned = numpy.array([[True, True, False], [False, True, True]])
        >>> ef.theory.rare_features(owned)
        RareFeatures(c=2, r=2, W=1.0)

    References:
        Richtarik, Gasanov, Burlachenko: Error Feedback Shines when Features are Rare (2023), for
        c and r. W was derived here: see `rare_features_w_step`.
    """
    owned = np.asarray(owned, bool)
    if owned.ndim != 2 or not owned.any():
        raise ValueError(
            f"got supports of shape {owned.shape} with {np.count_nonzero(owned)} entries, expected "
            "bool[n, d] with at least one; pass supports(features)"
        )
    each = np.ones(len(owned)) if L_i is None else np.asarray(L_i, float)
    if each.shape != (len(owned),) or not np.all((each > 0) & np.isfinite(each)):
        raise ValueError(
            f"got L_i of shape {each.shape} for {len(owned)} workers, expected one finite positive "
            "number for each; leave it out for equal weights"
        )
    weight = float((each / each.sum() @ owned).max())
    return RareFeatures(int(owned.sum(0).max()), int(owned.sum(1).max()), min(weight, 1.0))


def rare_features_step(constants: Smoothness, alpha: float, c: int) -> float:
    """EF21 if each feature has at most c owners, unweighted: 1 / (L + sqrt(c / n) L_QM xi).

    Derived here: the a_i = g_i - grad f_i vanish outside worker i's features, so at most c of them
    overlap in a coordinate and ||mean a_i||^2 <= (c / n) mean ||a_i||^2. The gradients must vanish
    there too: a regulariser on all coordinates makes every worker own every feature.

    Args:
        constants: of the problem.
        alpha: contraction on a worker's features, k / r for Top-k, in (0, 1].
        c: largest number of owners of a feature, 1 to n; see `rare_features`.

    Raises:
        ValueError: alpha or c is out of range.

    Example:
        >>> import ef_horovod as ef
        >>> ef.theory.rare_features_step(ef.theory.Smoothness(1.0, [1.0] * 4), alpha=0.75, c=1)
        0.6666666666666666

    References:
        Richtarik, Gasanov, Burlachenko: Error Feedback Shines when Features are Rare (2023), of
        which only the abstract was at hand.
    """
    if not 1 <= c <= constants.n:
        raise ValueError(
            f"got c={c} for {constants.n} workers, expected the most owners of a feature, 1 to "
            f"{constants.n}; take it from rare_features(supports)"
        )
    return 1 / (constants.L + math.sqrt(c / constants.n) * constants.L_QM * xi(alpha))


def rare_features_w_step(constants: Smoothness, alpha: float, W: float) -> float:
    """EF21 with rare features and weights: 1 / (L + sqrt(W) L_AM xi).

    Derived here, under the condition of `rare_features_step`: W = max_j sum_{i owns j} w_i, and
    Jensen within each coordinate gives ||mean a_i||^2 <= W sum ||a_i||^2 / (n^2 w_i).

    Args:
        constants: of the problem.
        alpha: contraction on a worker's features, in (0, 1].
        W: largest total weight of a feature's owners, in (0, 1]; see `rare_features`.

    Raises:
        ValueError: alpha or W is outside (0, 1].

    Example:
        >>> import ef_horovod as ef
        >>> ef.theory.rare_features_w_step(ef.theory.Smoothness(1.0, [1.0] * 4), 0.75, W=0.25)
        0.6666666666666666

    References:
        Error Feedback Reloaded (ICLR 2024), for the weights.
    """
    require_fraction("W", W)
    return 1 / (constants.L + math.sqrt(W) * constants.L_AM * xi(alpha))
