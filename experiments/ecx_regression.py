"""Linear regression: where the last error alone is enough, and where it is not.

For linear regression IGT and STORM are the same method, for the gradient of a sample is linear in
x; they differ in alpha here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

import ef_horovod as ef
from ef_horovod.methods import estimators
from experiments.claims import Report
from experiments.ecx_variants import variants
from experiments.workers import Workers

D, WORKERS, SAMPLES, NOISE = 50, 8, 200, 0.5
DECAY = ef.Decay(2 / 3)
FILTERS = ("EC, filter 0.3", "ECX, filter 0.3")
DIVERGED = 1e3  # the start is at 25
STEP_SIZES = (0.1, 0.2, 0.4, 0.7, 1.0)  # a fifth of it for momentum


class Case(NamedTuple):
    """What to run."""

    what: str
    estimator: estimators.Estimator
    alpha: ef.Decay | float
    compressor: ef.Compressor
    step: float
    batch: int = 4
    steps: int = 800

    @property
    def name(self) -> str:
        return f"{self.what}, {short(self.compressor)}, step {self.step:g}"


MOMENTUM, TOP_20 = estimators.Estimator(), ef.TopK(ratio=0.2)
SPECIFIED = [  # the settings of the specification
    Case("momentum", MOMENTUM, 0.05, ef.OneBit(), 0.02),
    Case("momentum", MOMENTUM, 0.05, ef.OneBit(), 0.05),
    Case("momentum", MOMENTUM, 0.05, ef.OneBit(), 0.1, steps=2000),  # EC grows slowly
    Case("momentum", MOMENTUM, 0.05, ef.TopK(ratio=0.5), 0.1),
    Case("STORM", estimators.STORM(DECAY), DECAY, ef.TopK(ratio=0.5), 0.05, steps=1000),
    Case("STORM", estimators.STORM(DECAY), DECAY, ef.OneBit(), 0.02, steps=1000),
    Case("IGT", estimators.IGT(0.05), 0.05, ef.TopK(ratio=0.5), 0.05),
]
LARGE = [  # large steps, little noise; the largest at which the uncompressed method still converges
    Case("STORM", estimators.STORM(DECAY), DECAY, TOP_20, 1.0, 32, 400),
    Case("STORM", estimators.STORM(DECAY), DECAY, ef.OneBit(), 1.0, 32, 400),
    Case("IGT", estimators.IGT(0.02), 0.02, ef.TopK(ratio=0.1), 0.5, 32, 400),
    Case("IGT", estimators.IGT(0.02), 0.02, ef.OneBit(), 1.0, 32, 400),
    Case("ROOT-SGD", estimators.ROOTSGD(), ef.Decay(1.0), TOP_20, 0.7, 32, 400),
    Case("ROOT-SGD", estimators.ROOTSGD(), ef.Decay(1.0), ef.OneBit(), 1.0, 32, 400),
]
Ends = dict[str, np.ndarray]  # F - F* of each seed, by variant


class Regression:
    """y = A x* + noise; F is half the mean squared error over all samples."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.A = rng.normal(size=(WORKERS, SAMPLES, D))
        self.y = self.A @ rng.normal(size=D) + NOISE * rng.normal(size=(WORKERS, SAMPLES))
        flat, labels = self.A.reshape(-1, D), self.y.reshape(-1)
        self.best = np.linalg.lstsq(flat, labels, rcond=None)[0]
        self.hessian = flat.T @ flat / len(flat)

    def gradient(self, worker: int, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """float64[D] on a minibatch."""
        a = self.A[worker, rows]
        return a.T @ (a @ x - self.y[worker, rows]) / len(rows)

    def gap(self, x: np.ndarray) -> float:
        """F - F*."""
        away = x - self.best
        return float(away @ self.hessian @ away / 2)


def compare(report: Report, workers: Workers, quick: bool) -> None:
    """The cases of the specification, then large steps."""
    problem, seeds = Regression(), range(1 if quick else 3)
    for case in SPECIFIED[2:3] if quick else SPECIFIED:
        case = case._replace(steps=200) if quick else case
        names = [name for name in variants(case.compressor, case.alpha) if name not in FILTERS]
        _judge_specified(report, case, _ends(report, workers, problem, case, names, seeds))
    better = []
    for case in LARGE[:1] if quick else LARGE:
        case = case._replace(steps=200) if quick else case
        names = list(variants(case.compressor, case.alpha))
        names = ["uncompressed", "EC", *FILTERS] if quick else names
        ends = _ends(report, workers, problem, case, names, seeds)
        better.append(_judge_large(report, case, ends))
    if not quick:  # with one seed there is no spread to judge by
        report.claim(
            "large steps: it is the second error that helps, not the filter alone",
            "ECX clearly below EC with the same filter in most cases",
            f"in {sum(better)} of {len(better)}",
            sum(better) > len(better) / 2,
        )


def sweep(report: Report, workers: Workers) -> None:
    """Curves of F - F* against the step size, for the second plot."""
    problem = Regression()
    cases = {
        "momentum, OneBit": SPECIFIED[0],
        "STORM, Top 20 %": LARGE[0],
        "STORM, OneBit": LARGE[1],
    }
    for title, case in cases.items():
        short_case = case._replace(steps=300)
        sizes = [s / 5 if case.what == "momentum" else s for s in STEP_SIZES]
        for name, method in _filters(case).items():
            ends = [
                train(workers, problem, short_case._replace(step=s), method, 0)[1] for s in sizes
            ]
            report.curve(f"sweep {title}: {name}", sizes, np.minimum(ends, DIVERGED).tolist())
        _judge_sweep(report, title, sizes)


def _judge_sweep(report: Report, title: str, sizes: list[float]) -> None:
    """A verdict on the default beta: at how many of the step sizes is it like uncompressed?"""
    start = f"sweep {title}: "
    ends = {
        label.removeprefix(start): np.array(curve["y"])
        for label, curve in report.curves.items()
        if label.startswith(start)
    }
    plain = ends.pop("uncompressed")
    good = {name: int(np.sum(end < 2 * plain)) for name, end in ends.items()}
    report.claim(
        f"{start}step sizes, of {len(sizes)}, that end below 2 times uncompressed",
        "most with the default beta 0.3",
        ", ".join(f"{name}: {count}" for name, count in good.items()),
        good["ECX, beta 0.3"] == max(good.values()),
    )


def _filters(case: Case) -> dict[str, ef.Method]:
    known = variants(case.compressor, case.alpha)
    chosen = {"uncompressed": known["uncompressed"], "EC": known["EC"]}
    ways: dict[str, Any] = {"server_compressor": case.compressor, "alpha": case.alpha}
    for beta in (1.0, 0.5, 0.3, 0.1):
        chosen[f"ECX, beta {beta:g}"] = ef.ErrorCompensatedX(case.compressor, **ways, beta=beta)
    return chosen


def _ends(
    report: Report,
    workers: Workers,
    problem: Regression,
    case: Case,
    names: list[str],
    seeds: range,
) -> Ends:
    """Runs a case; adds its row and the first seed's curves."""
    methods, ends = variants(case.compressor, case.alpha), {}
    every = max(case.steps // 100, 1)
    for name in names:
        runs = [train(workers, problem, case, methods[name], seed) for seed in seeds]
        ends[name] = np.array([end for _, end in runs])
        gaps = [gap for gap in runs[0][0] if gap < DIVERGED]
        if gaps:
            report.curve(f"{case.name}: {name}", range(0, len(gaps), every), gaps[::every])
    shown = {name: spread(ends[name]) if name in ends else "" for name in methods}
    report.row(what=case.what, compressor=short(case.compressor), step=f"{case.step:g}",
               batch=case.batch, **shown)  # fmt: skip
    return ends


def train(
    workers: Workers, problem: Regression, case: Case, method: ef.Method, seed: int
) -> tuple[list[float], float]:
    """F - F* after each step, and its mean over the last quarter; infinite if it diverged."""
    rows, gaps = _rows(seed, case.steps, case.batch), []

    def observe(x: np.ndarray) -> dict[str, Any]:
        gaps.append(problem.gap(x))
        return {}

    try:
        workers.run(
            method,
            lambda worker, x, step: problem.gradient(worker, x, rows[step, worker]),
            np.zeros(D),
            workers=WORKERS,
            steps=case.steps,
            step_size=case.step,
            estimator=case.estimator,
            observe=observe,
        )
    except ef.NonFiniteError:
        return gaps, float("inf")
    return gaps, float(np.mean(gaps[-case.steps // 4 :]))


@lru_cache(maxsize=4)
def _rows(seed: int, steps: int, batch: int) -> np.ndarray:
    """The samples of each step and worker: int64[steps, WORKERS, batch]."""
    return np.random.default_rng(seed).integers(0, SAMPLES, (steps, WORKERS, batch))


def _judge_specified(report: Report, case: Case, ends: Ends) -> None:
    plain, ecx, none = (ends[name] for name in ("uncompressed", "ECX", "no compensation"))
    report.claim(
        f"{case.name}: ECX like uncompressed", f"{plain.mean():.2e} within 15 %", spread(ecx),
        ecx.mean() < 1.15 * plain.mean(),
    )  # fmt: skip
    report.claim(
        f"{case.name}: compensation helps", f"clearly below {spread(none)}", spread(ecx),
        clearly_below(ecx, none),
    )  # fmt: skip
    if (case.compressor, case.step) == (ef.OneBit(), 0.1):
        factor = 100 if case.steps >= 2000 else 5  # it grows with time
        report.claim(
            f"{case.name}: EC is unstable, ECX is not",
            f"EC over {factor} times worse in all seeds",
            f"EC {spread(ends['EC'])}, ECX {spread(ecx)}",
            bool(np.all(ends["EC"] > factor * ecx)),
        )


def _judge_large(report: Report, case: Case, ends: Ends) -> bool:
    """Whether ECX ends clearly below EC with the same filter."""
    plain = ends["uncompressed"]
    report.claim(
        f"{case.name}: EC fails", "over 3 times uncompressed in all seeds", spread(ends["EC"]),
        bool(np.all(ends["EC"] > 3 * plain)),
    )  # fmt: skip
    ecx = ends["ECX, filter 0.3"]
    report.claim(
        f"{case.name}: ECX, filter 0.3, does not", f"below 2 times {plain.mean():.2e}",
        spread(ecx), bool(np.all(ecx < 2 * plain)),
    )  # fmt: skip
    return clearly_below(ecx, ends["EC, filter 0.3"])


def spread(ends: np.ndarray) -> str:
    """The mean and its standard error, or how many diverged."""
    lost = int(np.sum(~(ends < DIVERGED)))
    if lost:
        return "diverges" if lost == len(ends) else f"diverges in {lost} of {len(ends)}"
    error = 100 * _standard_error(ends) / ends.mean()
    return f"{ends.mean():.2e}" + (f" ± {error:.1f} %" if len(ends) > 1 else "")


def clearly_below(low: np.ndarray, high: np.ndarray) -> bool:
    """Whether the mean difference of the same seeds is over two standard errors below 0."""
    if not np.all(low < DIVERGED):
        return False
    off = np.minimum(high, DIVERGED) - low
    return bool(off.mean() > 2 * _standard_error(off))


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def short(compressor: ef.Compressor) -> str:
    """As in the tables: `OneBit` or `Top 20 %`."""
    if isinstance(compressor, ef.TopK):
        return f"Top {compressor.ratio:.0%}".replace("%", " %")
    return type(compressor).__name__
