"""ErrorCompensatedX: the errors of two steps (Tang, Li, Liu, Yan, NeurIPS 2021).

Linear regression, 8 workers of 200 samples, batches of 4, compression on both ways. Compared:
uncompressed, no compensation, the last error alone ("EC"), and the last two ("ECX"), for momentum,
STORM and IGT; then a map of where the filtered errors stay bounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ef_horovod as ef
from ef_horovod import estimators
from ef_horovod.arrays import namespace
from experiments.claims import Report, plot_curves
from experiments.workers import Workers

D, WORKERS, SAMPLES, BATCH, NOISE = 50, 8, 200, 4, 0.5
STORM_ALPHA = ef.Decay(2 / 3)


@dataclass(frozen=True)
class LastError(ef.ErrorCompensatedX):
    """EC: Delta_t = delta_{t-1}, ordinary compensation for methods that average."""

    weight: float = 1.0

    def _compensate(self, a: Any, state: Any, step: int) -> None:
        namespace(a).add(a, state.last, self.weight)


CASES = [  # what, estimator, alpha, compressor, step size
    ("momentum", estimators.Estimator(), 0.05, ef.OneBit(), 0.02),
    ("momentum", estimators.Estimator(), 0.05, ef.OneBit(), 0.05),
    ("momentum", estimators.Estimator(), 0.05, ef.OneBit(), 0.1),
    ("momentum", estimators.Estimator(), 0.05, ef.TopK(ratio=0.5), 0.1),
    ("STORM", estimators.STORM(STORM_ALPHA), STORM_ALPHA, ef.TopK(ratio=0.5), 0.05),
    ("STORM", estimators.STORM(STORM_ALPHA), STORM_ALPHA, ef.OneBit(), 0.02),
    ("IGT", estimators.IGT(0.05), 0.05, ef.TopK(ratio=0.5), 0.05),
]


def run(workers: Workers, data: Path, quick: bool) -> Report:
    """All cases, then the map; quick: fewer steps."""
    steps = 200 if quick else 2000
    report = Report("ecx", {"workers": WORKERS, "batch": BATCH, "steps": steps, "d": D})
    problem = Regression()
    for what, estimator, alpha, compressor, size in CASES[1:5:3] if quick else CASES:
        ends = {
            name: _train(report, workers, problem, (what, size, compressor), name, method, steps)
            for name, method in _methods(alpha, compressor, estimator).items()
        }
        _judge(report, f"{what}, {compressor}, step {size:g}", ends, quick)
    _map(report, 100 if quick else 400)
    return report


class Regression:
    """y = A x* + noise; F is the mean squared error over all samples."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.A = rng.normal(size=(WORKERS, SAMPLES, D))
        self.y = self.A @ rng.normal(size=D) + NOISE * rng.normal(size=(WORKERS, SAMPLES))
        flat, labels = self.A.reshape(-1, D), self.y.reshape(-1)
        self.best = np.linalg.lstsq(flat, labels, rcond=None)[0]
        self.hessian = flat.T @ flat / len(flat)

    def gradient(self, worker: int, x: np.ndarray, step: int) -> np.ndarray:
        rows = np.random.default_rng((worker, step)).integers(0, SAMPLES, BATCH)
        a = self.A[worker, rows]
        return a.T @ (a @ x - self.y[worker, rows]) / BATCH

    def gap(self, x: np.ndarray) -> float:
        away = x - self.best
        return float(away @ self.hessian @ away / 2)


def _methods(alpha: Any, compressor: Any, estimator: Any) -> dict[str, tuple[ef.Method, Any]]:
    kinds = {
        "uncompressed": ef.ErrorCompensatedX(
            ef.Identity(), down=ef.Identity(), alpha=alpha, beta=1.0
        ),
        "no compensation": LastError(
            compressor, down=compressor, alpha=alpha, beta=1.0, weight=0.0
        ),
        "EC": LastError(compressor, down=compressor, alpha=alpha, beta=1.0),
        "ECX": ef.ErrorCompensatedX(compressor, down=compressor, alpha=alpha, beta=1.0),
    }
    return {name: (method, estimator) for name, method in kinds.items()}


def _train(
    report: Report,
    workers: Workers,
    problem: Regression,
    case: tuple[str, float, ef.Compressor],
    name: str,
    method: tuple[ef.Method, Any],
    steps: int,
) -> float:
    """The mean of F - F* over the last quarter; infinite if it diverged."""
    what, size, compressor = case
    try:
        history = workers.run(
            method[0],
            problem.gradient,
            np.zeros(D),
            workers=WORKERS,
            steps=steps,
            step_size=size,
            estimator=method[1],
            observe=lambda x: {"gap": problem.gap(x)},
        )
        gaps = [entry["gap"] for entry in history]
    except ef.NonFiniteError:
        gaps = [float("inf")] * steps
    end = float(np.mean(gaps[-steps // 4 :]))
    kind = type(compressor).__name__
    if np.isfinite(end):
        every = max(steps // 100, 1)
        report.curve(f"{what}: {kind} {size:g} {name}", range(0, steps, every), gaps[::every])
    report.row(method=what, compressor=str(compressor), step=f"{size:g}", compensation=name,
               **{"F - F*": f"{end:.2e}"})  # fmt: skip
    return end


def _judge(report: Report, case: str, ends: dict[str, float], quick: bool) -> None:
    plain, ecx, none = ends["uncompressed"], ends["ECX"], ends["no compensation"]
    report.claim(
        f"{case}: ECX like uncompressed",
        f"{plain:.2e} within 15 %",
        f"{ecx:.2e}",
        ecx < (1.15 if not quick else 2) * plain,
    )
    if not quick:
        report.claim(f"{case}: compensation helps", f"below {none:.2e}", f"{ecx:.2e}", ecx < none)
    if case.startswith("momentum, OneBit()") and case.endswith("0.1"):
        report.claim(
            f"{case}: EC is unstable, ECX is not",
            "EC over 100 times worse",
            f"EC {ends['EC']:.1e}, ECX {ecx:.1e}",
            ends["EC"] > 100 * ecx,
        )


def _map(report: Report, steps: int) -> None:
    """||delta|| / ||A|| on one worker, for A = a fixed mean + N(0, I), alpha = 0.1."""
    d, alpha = 1000, 0.1
    for ratio in (0.01, 0.1, 0.3, 0.5):
        sizes = {}
        for beta in (1.0, 0.5, 0.3, 0.1):
            method = ef.ErrorCompensatedX(ef.TopK(ratio=ratio), alpha=alpha, beta=beta)
            sizes[beta] = _error_size(method, d, steps)
        shown = {f"beta {b:g}": f"{s:.1f}" if s < 1e3 else "diverges" for b, s in sizes.items()}
        report.row(method="map", compressor=f"top {ratio:.0%}", step="", compensation="",
                   **{"F - F*": "", **shown})  # fmt: skip
        report.claim(
            f"top {ratio:.0%}, alpha 0.1: the default beta 0.3 is stable",
            "||delta|| below 100 ||A||",
            f"{sizes[0.3]:.1f}",
            sizes[0.3] < 100,
        )


def _error_size(method: ef.Method, d: int, steps: int) -> float:
    rng = np.random.default_rng(0)
    mean = rng.normal(size=d)
    state, _ = method.init(np.zeros(d, np.float32))
    size = 0.0
    for step in range(steps):
        a = (mean + rng.normal(size=d)).astype(np.float32)
        norm = float(np.linalg.norm(a))
        try:
            _, state = method.push(state, a, ef.Key(0, step))
        except ef.NonFiniteError:
            return float("inf")
        size = float(np.linalg.norm(state.last)) / norm
        if size > 1e6:
            return float("inf")
    return size


def plot(report: Report, path: Path) -> None:
    """Distance from the minimum against steps."""
    panels = [
        w for w in ("momentum", "STORM", "IGT") if any(c.startswith(w) for c in report.curves)
    ]
    plot_curves(report, path, xlabel="step", ylabel="$F - F^*$", panels=panels)
