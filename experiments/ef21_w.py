"""EF21 with weights, clones and rare features: Error Feedback Reloaded (ICLR 2024).

Richtarik, Gasanov, Burlachenko. Top-1 and the steps of the theorems, nothing tuned. Claims: a step
with the arithmetic mean of the L_i takes no more rounds than one with the quadratic mean, and the
fewer the more the L_i differ; weights are that step and nothing else for homogeneous compressors;
clones come within sqrt(2) of it; features that few workers have allow a larger step still.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

import ef_horovod as ef
from ef_horovod import theory
from experiments.claims import Report, plot_curves
from experiments.descent import add_row, descend, judge_bound, largest_gap, relative_target
from experiments.libsvm import load_problem
from experiments.synthetic import rare_problem, spread_problem
from experiments.workers import Workers

WORKERS, D, ROWS = 100, 20, 10
LEVELS, MIDDLE = (0.0, 193.0, 6.3e3, 2.3e5), 6.3e3  # L_var
SEEDS = (0, 1, 2)
TOP = ef.TopK(k=1)
ALPHA = 1 / D
LIMIT = 20_000  # rounds


def run(workers: Workers, data: Path, quick: bool) -> Report:
    """All parts; quick: one problem, a nearer target, no w8a."""
    target = 0.5 if quick else 0.2
    report = Report(
        "ef21-w",
        {"workers": WORKERS, "d": D, "compressor": TOP, "target": f"{target:g} ||grad f(x0)||^2"},
    )
    ratios = {}
    for seed in SEEDS[:1] if quick else SEEDS:
        for level in (MIDDLE,) if quick else LEVELS if seed == 0 else LEVELS[1:]:
            ratios[level, seed] = _compare_means(report, workers, level, seed, target)
    _judge_growth(report, ratios)
    problem = spread_problem(SEEDS[0], WORKERS, D, ROWS, MIDDLE)
    _weights(report, workers, problem, 30 if quick else 100)
    _clones(report, workers, problem, target)
    if not quick:
        _partial(report, workers, problem, target)
        _rare(report, workers, "w8a", _w8a(data), 0.7, 3000)
    _rare(report, workers, "made up", rare_problem(0, 20, 6, 0.5), target, 500 if quick else 4000)
    return report


def _compare_means(
    report: Report, workers: Workers, level: float, seed: int, relative: float
) -> float:
    """How many times fewer rounds the step with L_AM takes."""
    problem, x0 = spread_problem(seed, WORKERS, D, ROWS, level), np.zeros(D)
    constants, goal = problem.smoothness(), relative_target(problem, x0, relative)
    steps = {
        "L_AM": theory.ef21_am_step(constants, ALPHA),
        "L_QM": theory.ef21_step(constants, ALPHA),
    }
    part, rounds = f"L_var {constants.L_var:.2g}, seed {seed}", {}
    for name, step in steps.items():
        run = descend(workers, problem, ef.EF21(TOP), step, x0, LIMIT, target=goal)
        rounds[name] = add_row(report, part, f"EF21, {name}", run, goal) or LIMIT
        weighted = name == "L_AM"
        judge_bound(report, f"{part}, {name}", run, problem, x0, ALPHA, weighted=weighted)
    ratio = rounds["L_QM"] / rounds["L_AM"]
    report.claim(
        f"{part}: the step with L_AM takes no more rounds",
        f"at most {rounds['L_QM']:,}",
        f"{rounds['L_AM']:,}, {ratio:.2f} times fewer",
        rounds["L_AM"] <= rounds["L_QM"],
    )
    if level == MIDDLE:
        report.claim(
            f"{part}: it takes far fewer", "at least 1.9 times", f"{ratio:.2f}", ratio >= 1.9
        )
    return ratio


def _judge_growth(report: Report, ratios: dict[tuple[float, int], float]) -> None:
    for seed in sorted({seed for _, seed in ratios}):
        found = [ratio for (_, s), ratio in sorted(ratios.items()) if s == seed]
        if len(found) > 1:
            report.claim(
                f"seed {seed}: the gain grows with L_var",
                "each larger than the last",
                ", ".join(f"{ratio:.2f}" for ratio in found),
                all(a < b for a, b in pairwise(found)),
            )


def _weights(report: Report, workers: Workers, problem: theory.Problem, rounds: int) -> None:
    """EF21-W against EF21 at the same step: the same for Top-k, not for Natural."""
    constants, x0, apart = problem.smoothness(), np.zeros(D), {}
    for compressor in (TOP, ef.Natural()):
        step = theory.ef21_w_step(constants, compressor.contraction(D))
        plain, weighted = (
            descend(workers, problem, method, step, x0, rounds)
            for method in (ef.EF21(compressor), ef.EF21(compressor, weights=constants.L_i))
        )
        apart[compressor] = largest_gap(plain, weighted)
        report.claim(
            f"weights, {compressor}: EF21-W is as near as EF21 after {rounds} rounds",
            f"grad squared of {plain.norms[-1]:.3g} within 10 %, or below 1e-10",
            f"{weighted.norms[-1]:.3g}",
            weighted.norms[-1] <= max(1.1 * plain.norms[-1], 1e-10),
        )
    report.claim(
        f"weights, {TOP}: EF21-W is EF21",
        "iterates apart by rounding, < 1e-5",
        f"{apart[TOP]:.1e}",
        apart[TOP] < 1e-5,
    )
    report.claim(
        "weights, Natural(): EF21-W is not EF21",
        "iterates apart by more than rounding, > 1e-3",
        f"{apart[ef.Natural()]:.1e}",
        apart[ef.Natural()] > 1e-3,
    )


def _clones(report: Report, workers: Workers, problem: theory.Problem, relative: float) -> None:
    rng, worst, most = np.random.default_rng(0), 0.0, 0.0
    for _ in range(2000):
        L_i = np.exp(rng.uniform(0, 6) * rng.normal(size=rng.integers(1, 300)))
        cloning = theory.clone(L_i)
        worst = max(worst, cloning.L_QM / cloning.bound)
        most = max(most, cloning.total / len(L_i))
    report.claim(
        "clones, 2000 draws of up to 300 L_i: the worst L_QM",
        "at most sqrt(2) L_AM",
        f"{worst * np.sqrt(2):.4f} L_AM",
        worst <= 1,
    )
    report.claim("clones: the most of them", "at most 2 n", f"{most:.3f} n", most <= 2)
    constants, x0 = problem.smoothness(), np.zeros(D)
    cloning, goal = theory.clone(constants.L_i), relative_target(problem, x0, relative)
    owner = np.repeat(np.arange(WORKERS), cloning.copies)
    step = theory.ef21_step(theory.Smoothness(constants.L, cloning.scale[owner] * np.array(
        constants.L_i)[owner]), ALPHA)  # fmt: skip
    run = descend(
        workers,
        problem,
        ef.EF21(TOP),
        step,
        x0,
        LIMIT,
        target=goal,
        gradient=lambda j, x, t: cloning.scale[owner[j]] * problem.gradient(owner[j], x),
        crew=cloning.total,
    )
    part = f"L_var {constants.L_var:.2g}, seed {SEEDS[0]}"
    rounds = add_row(report, part, f"EF21, {cloning.total} clones", run, goal) or LIMIT
    am, with_am = theory.ef21_am_step(constants, ALPHA), _rounds_of(report, part, "EF21, L_AM")
    report.claim(
        f"{part}: clones take as many rounds more as their step is smaller",
        f"{am / step:.3f} times {with_am}, within 5 %",
        f"{rounds:,}, {rounds / with_am:.3f} times",
        abs(rounds / with_am / (am / step) - 1) < 0.05,
    )


def _rounds_of(report: Report, part: str, method: str) -> int:
    (row,) = (r for r in report.rows if r["part"] == part and r["method"] == method)
    return int(row["rounds"].replace(",", ""))


def _partial(report: Report, workers: Workers, problem: theory.Problem, relative: float) -> None:
    """EF21-W-PP: half of the workers in a round."""
    constants, x0, rounds = problem.smoothness(), np.zeros(D), {}
    goal, best = relative_target(problem, x0, relative), theory.pp_best_s(ALPHA, 0.5)
    for name, make in (("L_AM", theory.ef21_w_pp_step), ("L_QM", theory.ef21_pp_step)):
        weights = constants.L_i if name == "L_AM" else None
        run = descend(
            workers,
            problem,
            ef.EF21(TOP, participation=0.5, weights=weights),
            make(constants, ALPHA, 0.5, s=best, rho=best),
            x0,
            LIMIT,
            target=goal,
        )
        method = f"EF21{'-W' if weights else ''}-PP, {name}"
        rounds[name] = add_row(report, "half of the workers", method, run, goal) or LIMIT
    report.claim(
        "half of the workers: EF21-W-PP takes fewer rounds than EF21-PP",
        "at least 1.9 times",
        f"{rounds['L_QM'] / rounds['L_AM']:.2f}",
        rounds["L_QM"] >= 1.9 * rounds["L_AM"],
    )


def _w8a(data: Path) -> theory.Problem:
    """Its first 2000 rows that have any feature, 100 on each of 20 workers, not regularised."""
    whole = load_problem(data, "w8a", 1).shards[0]
    rows = np.flatnonzero(whole.features.any(axis=1))[:2000]
    shards = theory.contiguous_shards(whole.features[rows], whole.labels[rows], 20)
    return theory.Problem(shards, "logistic", "none", 0.0)


def _rare(
    report: Report,
    workers: Workers,
    name: str,
    problem: theory.Problem,
    relative: float,
    limit: int,
) -> None:
    """The four steps in rising order; without a regulariser, which would own every feature."""
    constants, d = problem.smoothness(), problem.features[0].shape[1]
    rare = theory.rare_features(theory.supports(problem.features), constants.L_i)
    x0 = np.zeros(d)
    goal, rounds = relative_target(problem, x0, relative), {}
    steps = {
        "L_QM": theory.ef21_step(constants, 1 / d),
        "L_AM": theory.ef21_am_step(constants, 1 / d),
        "rare, L_QM": theory.rare_features_step(constants, 1 / rare.r, rare.c),
        "rare, L_AM": theory.rare_features_w_step(constants, 1 / rare.r, rare.W),
    }
    part = f"{name}: c {rare.c} of {len(problem.shards)}, r {rare.r} of {d}, W {rare.W:.2f}"
    for kind, step in steps.items():
        run = descend(workers, problem, ef.EF21(TOP), step, x0, limit, target=goal)
        rounds[kind] = add_row(report, part, f"EF21, {kind}", run, goal) or limit + 1
    report.claim(
        f"{part}: features that few have allow fewer rounds",
        f"fewer than {rounds['L_AM']:,} (L_AM) and {rounds['L_QM']:,} (L_QM)",
        f"{rounds['rare, L_AM']:,} (L_AM), {rounds['rare, L_QM']:,} (L_QM)",
        rounds["rare, L_AM"] < rounds["L_AM"] and rounds["rare, L_QM"] < rounds["L_QM"],
    )


def plot(report: Report, path: Path) -> None:
    """Squared gradient norm against rounds."""
    wished = ("L_var 6.3e+03, seed 0", "w8a", "made up")
    panels = [p for p in wished if any(label.startswith(p) for label in report.curves)]
    plot_curves(report, path, xlabel="round", ylabel="$||\\nabla f(x)||^2$", panels=panels)
