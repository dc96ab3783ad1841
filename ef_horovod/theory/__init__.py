"""The papers' theory in numbers: smoothness, step sizes, thresholds, bytes. NumPy only.

    >>> import ef_horovod as ef, numpy
    >>> A, y = numpy.array([[1.0, 0.0], [0.0, 2.0]]), numpy.array([1.0, -1.0])
    >>> problem = ef.theory.Problem(ef.theory.contiguous_shards(A, y, 2), "logistic", "l2", 0.1)
    >>> step = ef.theory.ef21_step(problem.smoothness(), ef.TopK(k=1).contraction(2))
    >>> run = ef.simulate(ef.EF21(ef.TopK(k=1)), problem.gradient, numpy.zeros(2),
    ...                   workers=2, steps=200, step_size=step)
    >>> bool(numpy.linalg.norm(problem.mean_gradient(run.x)) < 1e-2)
    True

"Derived here" in a docstring: not taken from a paper's text; the docstring gives the argument.
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
from ef_horovod.theory.cloning import Cloning, clone
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
    ef21_am_pl_step,
    ef21_am_step,
    ef21_pl_step,
    ef21_pp_step,
    ef21_step,
    ef21_w_pp_step,
    ef21_w_step,
    pp_best_s,
    theta,
    xi,
)

__all__ = [
    "Calibration",
    "Cloning",
    "Problem",
    "RareFeatures",
    "Shard",
    "Smoothness",
    "calibrate",
    "clone",
    "contiguous_shards",
    "dropped_error",
    "ef21_am_pl_step",
    "ef21_am_step",
    "ef21_bc_step",
    "ef21_pl_step",
    "ef21_pp_step",
    "ef21_step",
    "ef21_w_pp_step",
    "ef21_w_step",
    "gram_norm",
    "load_libsvm",
    "optimal_threshold",
    "pl_constant",
    "pp_best_s",
    "rare_features",
    "rare_features_step",
    "rare_features_w_step",
    "smoothness_constants",
    "supports",
    "theta",
    "threshold_from_budget",
    "xi",
]
