"""The step size of EF21 with compression in both directions."""

from __future__ import annotations

from ef_horovod.theory.smoothness import Smoothness
from ef_horovod.theory.steps import xi


def ef21_bc_step(constants: Smoothness, alpha: float, alpha_server: float) -> float:
    """EF21-BC, nonconvex: 1 / (L + L_QM ((1 + xi(alpha)) (1 + xi(alpha_server)) - 1)).

    Derived here, for compressors with ||C(x) - x||^2 <= (1 - alpha) ||x||^2 and ||C(x)|| <= ||x||
    in every draw, such as Top-k. The paper's constants were not available. Let q = sqrt(1 - alpha),
    so that xi = q / (1 - q), and likewise r for alpha_server. Let D_t = ||x^{t+1} - x^t||. The
    error of the workers' tracking is a_t = sqrt(mean ||h_i - grad f_i||^2). The error of the
    server's broadcast is e_t = ||G - mean h_i||. Then:

        a_{t+1} <= q (a_t + L_QM D_t),    e_{t+1} <= r (e_t + a_t + L_QM D_t).

    Take norms of the sequences over t, up to terms of the start. Then a <= xi L_QM D and e <=
    xi_down (a + L_QM D), so ||G - grad f|| <= a + e <= ((1 + xi) (1 + xi_down) - 1) L_QM D. With c
    for that factor, f decreases if step^2 c^2 + step L <= 1. The step 1 / (L + c) satisfies this.

    Args:
        constants: of the problem.
        alpha: contraction of the workers' compressor, in (0, 1].
        alpha_server: contraction of `server_compressor`; 1 gives `ef21_step`.

    Raises:
        ValueError: alpha or alpha_server is outside (0, 1].

    Example:
        >>> import ef_horovod as ef
        >>> constants = ef.theory.Smoothness(1.0, [1.0])
        >>> ef.theory.ef21_bc_step(constants, alpha=0.75, alpha_server=0.75)
        0.25
        >>> bool(ef.theory.ef21_bc_step(constants, 0.1, 1.0) == ef.theory.ef21_step(constants, 0.1))
        True

    References:
        Fatkhullin et al.: EF21 with Bells & Whistles (2021), Table 2 for the method and Table 1 for
        the order of the rounds, 1 / (alpha alpha_server eps^2).
    """
    factor = xi(alpha) + xi(alpha_server) + xi(alpha) * xi(alpha_server)
    return 1 / (constants.L + constants.L_QM * factor)
