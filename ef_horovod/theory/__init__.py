"""What the papers say in numbers: smoothness, step sizes, thresholds, bytes. NumPy only.

    >>> import ef_horovod as ef, numpy
    >>> A, y = numpy.array([[1.0, 0.0], [0.0, 2.0]]), numpy.array([1.0, -1.0])
    >>> problem = ef.theory.Problem(ef.theory.contiguous_shards(A, y, 2), "logistic", "l2", 0.1)
    >>> step = ef.theory.ef21_step(problem.smoothness(), ef.TopK(k=1).contraction(2))
    >>> run = ef.simulate(ef.EF21(ef.TopK(k=1)), problem.gradient, numpy.zeros(2),
    ...                   workers=2, steps=200, step_size=step)
    >>> bool(numpy.linalg.norm(problem.mean_gradient(run.x)) < 1e-2)
    True

What a docstring calls "recalled" was written down from memory of a paper and not checked against
its text; what it calls "derived here" follows from an argument that is given in the docstring.
"""

from __future__ import annotations

from ef_horovod.theory.both_ways import ef21_bc_step
from ef_horovod.theory.budget import (
    Calibration,
    calibrate,
    dropped_error,
    optimal_threshold,
    threshold_from_budget,
)
from ef_horovod.theory.cloning import Cloning, clone, cloned_L_QM
from ef_horovod.theory.cost import (
    Cost,
    Network,
    Software,
    Work,
    half_precision_cost,
    possible_exchanges,
    step_cost,
)
from ef_horovod.theory.exchanges import (
    Traffic,
    break_even_density,
    break_even_ranks,
    dense_traffic,
    double_pass_traffic,
    gather_traffic,
    method_traffic,
    reduce_traffic,
    server_traffic,
    traffic,
)
from ef_horovod.theory.problems import Problem, Shard, contiguous_shards, load_libsvm
from ef_horovod.theory.rare import (
    RareFeatures,
    rare_features,
    rare_features_step,
    rare_features_w_step,
    supports,
)
from ef_horovod.theory.smoothness import Smoothness, gram_norm, pl_constant, smoothness_constants
from ef_horovod.theory.steps import (
    alpha_of_variance,
    beta,
    ef21_am_pl_step,
    ef21_am_step,
    ef21_pl_step,
    ef21_pp_step,
    ef21_sgdm_recalled_step,
    ef21_step,
    ef21_w_pl_step,
    ef21_w_pp_step,
    ef21_w_step,
    pp_best_s,
    theta,
    xi,
)

__all__ = [
    "Calibration",
    "Cloning",
    "Cost",
    "Network",
    "Problem",
    "RareFeatures",
    "Shard",
    "Smoothness",
    "Software",
    "Traffic",
    "Work",
    "alpha_of_variance",
    "beta",
    "break_even_density",
    "break_even_ranks",
    "calibrate",
    "clone",
    "cloned_L_QM",
    "contiguous_shards",
    "dense_traffic",
    "double_pass_traffic",
    "dropped_error",
    "ef21_am_pl_step",
    "ef21_am_step",
    "ef21_bc_step",
    "ef21_pl_step",
    "ef21_pp_step",
    "ef21_sgdm_recalled_step",
    "ef21_step",
    "ef21_w_pl_step",
    "ef21_w_pp_step",
    "ef21_w_step",
    "gather_traffic",
    "gram_norm",
    "half_precision_cost",
    "load_libsvm",
    "method_traffic",
    "optimal_threshold",
    "pl_constant",
    "possible_exchanges",
    "pp_best_s",
    "rare_features",
    "rare_features_step",
    "rare_features_w_step",
    "reduce_traffic",
    "server_traffic",
    "smoothness_constants",
    "step_cost",
    "supports",
    "theta",
    "threshold_from_budget",
    "traffic",
    "xi",
]
