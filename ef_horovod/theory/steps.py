"""Step sizes allowed by the theorems. alpha is `compressor.contraction(d)`."""

from __future__ import annotations

import math

from ef_horovod.theory.smoothness import Smoothness


def theta(alpha: float) -> float:
    """theta = 1 - sqrt(1 - alpha): how fast a tracked gradient approaches the true one.

    Args:
        alpha: contraction in (0, 1], E||C(x) - x||^2 <= (1 - alpha) ||x||^2.

    Raises:
        ValueError: alpha outside (0, 1].

    Example:
        >>> import ef_horovod as ef
        >>> ef.theory.theta(0.75)
        0.5

    References:
        Richtarik, Sokolov, Fatkhullin: EF21 (NeurIPS 2021), Theorem 2 of the authors' poster.
    """
    require_fraction("alpha", alpha)
    return alpha / (1 + math.sqrt(1 - alpha))  # the same without cancellation for small alpha


def xi(alpha: float) -> float:
    """xi = (1 + sqrt(1 - alpha)) / alpha - 1: the cost of compression.

    It is 0 for alpha = 1 and about 2 / alpha for small alpha. In the paper xi = sqrt(beta / theta),
    with beta = (1 - alpha) / theta, by which a moved gradient adds to the error.

    Args:
        alpha: contraction in (0, 1].

    Raises:
        ValueError: alpha outside (0, 1].

    Example:
        >>> import ef_horovod as ef
        >>> round(ef.theory.xi(1 / 68), 4)
        134.4981

    References:
        EF21 (NeurIPS 2021), Theorem 2 of the authors' poster; named xi in Error
        Feedback Reloaded (ICLR 2024).
    """
    require_fraction("alpha", alpha)  # before the square root
    return math.sqrt(1 - alpha) / theta(alpha)


def ef21_step(constants: Smoothness, alpha: float) -> float:
    """EF21, nonconvex: 1 / (L + L_QM xi).

    Args:
        constants: of the problem.
        alpha: contraction in (0, 1].

    Raises:
        ValueError: alpha outside (0, 1].

    Example:
        >>> import ef_horovod as ef
        >>> ef.theory.ef21_step(ef.theory.Smoothness(2.0, [2.0, 2.0]), alpha=0.75)
        0.25

    References:
        EF21 (NeurIPS 2021), Theorem 2 of the authors' poster.
    """
    return 1 / (constants.L + constants.L_QM * xi(alpha))


def ef21_am_step(constants: Smoothness, alpha: float) -> float:
    """EF21, nonconvex, with the arithmetic mean: 1 / (L + L_AM xi), never below `ef21_step`.

    Derived here; two secondary sources on Theorem 3 of the paper agree. With w_i = L_i / sum_j L_j,
    Jensen gives ||mean a_i||^2 <= sum ||a_i||^2 / (n^2 w_i), and sum L_i^2 / (n^2 w_i) = L_AM^2. So
    the proof of `ef21_step` holds with G = sum ||g_i - grad f_i||^2 / (n^2 w_i) instead of the
    mean.

    Args:
        constants: of the problem.
        alpha: contraction in (0, 1].

    Raises:
        ValueError: alpha outside (0, 1].

    Example:
        >>> import ef_horovod as ef
        >>> ef.theory.ef21_am_step(ef.theory.Smoothness(2.0, [1.0, 3.0]), alpha=0.75)
        0.25

    References:
        Richtarik, Gasanov, Burlachenko: Error Feedback Reloaded (ICLR 2024), Theorem 3.
    """
    return 1 / (constants.L + constants.L_AM * xi(alpha))


def ef21_w_step(constants: Smoothness, alpha: float) -> float:
    """EF21-W, nonconvex: 1 / (L + L_AM xi), the same as `ef21_am_step`.

    Derived here: EF21-W tracks grad f_i / (n w_i), each L_AM-smooth, with weights w_i, so the
    proof of `ef21_step` applies with the weighted mean. Under the PL condition `ef21_am_pl_step`
    is its step likewise.

    Args:
        constants: of the problem.
        alpha: contraction in (0, 1].

    Raises:
        ValueError: alpha outside (0, 1].

    Example:
        >>> import ef_horovod as ef
        >>> ef.theory.ef21_w_step(ef.theory.Smoothness(2.0, [1.0, 3.0]), alpha=0.75)
        0.25

    References:
        Error Feedback Reloaded (ICLR 2024), EF21-W.
    """
    return ef21_am_step(constants, alpha)


def ef21_pl_step(constants: Smoothness, alpha: float, mu: float) -> float:
    """EF21 under the PL condition: min{1 / (L + sqrt(2) L_QM xi), theta / (2 mu)}.

    Psi = f - f* + (step / theta) mean ||g_i - grad f_i||^2 then shrinks by 1 - step mu per round.

    Args:
        constants: of the problem.
        alpha: contraction in (0, 1].
        mu: ||grad f(x)||^2 >= 2 mu (f(x) - f*), positive; see `pl_constant`.

    Raises:
        ValueError: alpha outside (0, 1], or mu not positive.

    Example:
        >>> import ef_horovod as ef
        >>> ef.theory.ef21_pl_step(ef.theory.Smoothness(1.0, [1.0]), alpha=1.0, mu=0.25)
        1.0

    References:
        EF21 (NeurIPS 2021), Theorem 3 of the authors' poster.
    """
    return _pl_step(constants.L, constants.L_QM, alpha, mu)


def ef21_am_pl_step(constants: Smoothness, alpha: float, mu: float) -> float:
    """EF21 under the PL condition, with L_AM instead of L_QM.

    Derived here: the proof of `ef21_pl_step` with the weighted G of `ef21_am_step`, also in Psi.

    Args:
        constants: of the problem.
        alpha: contraction in (0, 1].
        mu: as for `ef21_pl_step`.

    Raises:
        ValueError: alpha outside (0, 1], or mu not positive.

    Example:
        >>> import ef_horovod as ef
        >>> ef.theory.ef21_am_pl_step(ef.theory.Smoothness(1.0, [1.0]), alpha=1.0, mu=2.0)
        0.25

    References:
        Error Feedback Reloaded (ICLR 2024) for the weights.
    """
    return _pl_step(constants.L, constants.L_AM, alpha, mu)


def ef21_pp_step(
    constants: Smoothness, alpha: float, p: float, *, s: float = 1e-3, rho: float = 1e-3
) -> float:
    """EF21-PP, workers join with probability p each: 1 / (L + sqrt(B / theta_p)).

    theta = 1 - (1 + s)(1 - alpha), beta = (1 + 1/s)(1 - alpha), theta_p = p theta - (1 - p) rho,
    B = (p beta + (1 + 1/rho)(1 - p)) L_QM^2. Any s, rho > 0 with theta_p > 0 are allowed. The
    default is that of the reference code and far from the best. `pp_best_s` gives the best value
    for both. The step is then 1 / (L + L_QM xi(p alpha)) (derived here).

    Args:
        constants: of the problem.
        alpha: contraction in (0, 1].
        p: probability in (0, 1].
        s, rho: free constants of Young's inequality, positive.

    Raises:
        ValueError: alpha, p, s or rho is out of range, or theta_p <= 0.

    Example:
        >>> import ef_horovod as ef
        >>> constants, s = ef.theory.Smoothness(1.0, [1.0]), ef.theory.pp_best_s(0.5, 0.5)
        >>> step = ef.theory.ef21_pp_step(constants, 0.5, 0.5, s=s, rho=s)
        >>> round(step, 6), round(1 / (1 + ef.theory.xi(0.25)), 6)
        (0.133975, 0.133975)
        >>> round(ef.theory.ef21_pp_step(constants, 0.5, 0.5), 6)
        0.017895

    References:
        EF21 with Bells & Whistles (2021), Theorem 7, as coded in FL_PyTorch's `algorithms.py`;
        the lemma behind it was derived again.
    """
    return 1 / (constants.L + constants.L_QM * _pp_factor(alpha, p, s, rho))


def ef21_w_pp_step(
    constants: Smoothness, alpha: float, p: float, *, s: float = 1e-3, rho: float = 1e-3
) -> float:
    """EF21-W-PP: `ef21_pp_step` with L_AM instead of L_QM.

    Derived here from the lemma of EF21-PP with the weights of `ef21_w_step`. The paper's constants
    were not available.

    Args:
        constants: of the problem.
        alpha: contraction in (0, 1].
        p: probability in (0, 1], the same for all workers.
        s, rho: as for `ef21_pp_step`.

    Raises:
        ValueError: as for `ef21_pp_step`.

    Example:
        >>> import ef_horovod as ef
        >>> ef.theory.ef21_w_pp_step(ef.theory.Smoothness(2.0, [1.0, 3.0]), alpha=1.0, p=1.0)
        0.5

    References:
        Error Feedback Reloaded (ICLR 2024), EF21-W-PP.
    """
    return 1 / (constants.L + constants.L_AM * _pp_factor(alpha, p, s, rho))


def pp_best_s(alpha: float, p: float) -> float:
    """s = rho = 1 / sqrt(1 - p alpha) - 1, which maximise `ef21_pp_step`. Derived here.

    An absent worker sends C'(x) = 0, so C' is a contraction with p alpha, and EF21-PP is EF21 with
    C'. These s and rho give exactly xi(p alpha). For p alpha = 1 both are infinite, and any finite
    number works; 1.0 is returned.

    Args:
        alpha: contraction in (0, 1].
        p: probability in (0, 1].

    Raises:
        ValueError: alpha or p outside (0, 1].

    Example:
        >>> import ef_horovod as ef
        >>> ef.theory.pp_best_s(alpha=0.75, p=1.0)
        1.0
    """
    require_fraction("alpha", alpha)
    require_fraction("p", p)
    root = math.sqrt(1 - p * alpha)
    return p * alpha / (root * (1 + root)) if root else 1.0


def _pl_step(L: float, mean: float, alpha: float, mu: float) -> float:
    if not 0 < mu < math.inf:
        raise ValueError(f"got mu={mu}, expected a finite positive PL constant; see pl_constant")
    return min(1 / (L + math.sqrt(2) * mean * xi(alpha)), theta(alpha) / (2 * mu))


def _pp_factor(alpha: float, p: float, s: float, rho: float) -> float:
    """sqrt(B / theta_p) without the mean of the L_i."""
    require_fraction("alpha", alpha)
    require_fraction("p", p)
    if not (0 < s < math.inf and 0 < rho < math.inf):
        raise ValueError(f"got s={s} and rho={rho}, expected positive numbers; see pp_best_s")
    theta_p = p * (1 - (1 + s) * (1 - alpha)) - (1 - p) * rho
    if theta_p <= 0:
        raise ValueError(
            f"got alpha={alpha:g}, p={p:g}, s={s:g} and rho={rho:g}, with which theta_p = "
            f"{theta_p:.3g}, expected a positive one; take s = rho = pp_best_s(alpha, p), "
            f"{pp_best_s(alpha, p):.3g}"
        )
    b = p * (1 + 1 / s) * (1 - alpha) + (1 + 1 / rho) * (1 - p)
    return math.sqrt(b / theta_p)


def require_fraction(name: str, value: float) -> None:
    """Raise ValueError unless value is in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"got {name}={value}, expected a number in (0, 1]; 1 is no loss at all")
