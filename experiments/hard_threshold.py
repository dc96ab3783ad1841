"""Hard-threshold sparsification (Sahu, Dutta, Abdelmoniem, Banerjee, Canini, Kalnis, NeurIPS 2021).

For a fixed sequence of vectors and a number of entries in total, a hard threshold makes the error
smallest, exactly. In training (EF-GD-star on phishing: gradients minus those at the minimum, so
that compression is the only source of error) it has a far smaller total error than top-k at equal
volume, and the same loss. A network follows in `hard_threshold_network`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import ef_horovod as ef
from ef_horovod import theory
from experiments.claims import Report, plot_curves
from experiments.convex import minimiser
from experiments.counting import Counts, counted
from experiments.hard_threshold_network import add_network, plot_network, prepare
from experiments.libsvm import load_problem
from experiments.workers import Workers

WORKERS, BUDGET = 20, 1.0  # entries that a worker sends in a step, on average


def run(workers: Workers, data: Path, quick: bool) -> Report:
    """Fixed sequences, then training; quick: fewer steps."""
    network = prepare(workers, data, quick)  # first, for it may miss something
    steps = 300 if quick else 1500
    report = Report("hard-threshold", {"workers": WORKERS, "steps": steps, "data": "phishing"})
    _fixed_sequence(report)
    plain = load_problem(data, "phishing", WORKERS, regulariser="none", lam=0.0)
    L = plain.smoothness().L
    problem = load_problem(data, "phishing", WORKERS, regulariser="l2", lam=L / 1e4)
    best = minimiser(problem)
    step = 1 / (L + L / 1e4)
    at_best = [problem.gradient(i, best) for i in range(WORKERS)]
    for label, shift in (("EF-GD-star", at_best), ("EF-GD", [0.0] * WORKERS)):

        def gradient(worker: int, x: np.ndarray, t: int, shift: Any = shift) -> np.ndarray:
            return problem.gradient(worker, x) - shift[worker]

        trained = _compare(report, workers, label, problem, gradient, best, step, steps)
        if label == "EF-GD-star":
            _judge(report, trained, quick)
    if network is not None:
        add_network(report, network, quick)
    return report


def _fixed_sequence(report: Report) -> None:
    rng = np.random.default_rng(0)
    vectors = [rng.standard_t(2, size=30) * 0.7**t for t in range(5)]
    total = 3 * len(vectors)
    threshold = theory.optimal_threshold(vectors, total)
    hard = theory.dropped_error(vectors, threshold)
    top = sum(float(np.sum(np.sort(np.abs(v))[:-3] ** 2)) for v in vectors)
    entries = np.sort(np.abs(np.concatenate(vectors)))
    smallest = float(np.sum(entries[:-total] ** 2))
    report.claim(
        "fixed sequence: no selection of equal volume has a smaller error",
        f"{smallest:.6g}",
        f"{hard:.6g} (top-3 each: {top:.4g})",
        np.isclose(hard, smallest, rtol=1e-12) and hard <= top,
    )


def _compare(
    report: Report,
    workers: Workers,
    label: str,
    problem: theory.Problem,
    gradient: Any,
    best: np.ndarray,
    step: float,
    steps: int,
) -> dict[str, tuple[float, float, float]]:
    """{compressor: (volume, total error, f - f*)}; the threshold is calibrated to the budget."""

    def train(compressor: ef.Compressor) -> tuple[float, float, float]:
        counts = Counts()
        history = workers.run(
            counted(ef.ErrorFeedback(compressor, step_inside=step), counts),
            gradient,
            best + 0.5,
            workers=WORKERS,
            steps=steps,
            step_size=step,
            observe=lambda x: {"gap": problem.mean_value(x) - problem.mean_value(best)},
        )
        name = f"{label}: {type(compressor).__name__}"
        report.curve(name, range(steps), [max(entry["gap"], 1e-16) for entry in history])
        entries, error = (workers.sum(n) / WORKERS for n in (counts.entries, counts.error))
        return entries / steps, error, history[-1]["gap"]

    found = theory.calibrate(lambda t: train(ef.HardThreshold(t))[0], BUDGET, start=0.02)
    results = {
        "HardThreshold": train(ef.HardThreshold(found.threshold)),
        "TopK": train(ef.TopK(k=1)),
    }
    for name, (volume, error, gap) in results.items():
        report.row(
            training=label,
            compressor=name,
            **{"entries a step": f"{volume:.3f}", "total error": f"{error:.4g}"},
            **{"f - f*": f"{gap:.2e}"},
        )
    volume = results["HardThreshold"][0]
    report.claim(
        f"{label}: calibration meets the budget",
        "within 5 %",
        f"{volume:.3f} for {BUDGET:g} at threshold {found.threshold:.3g}",
        abs(volume / BUDGET - 1) <= 0.05,
    )
    return results


def _judge(report: Report, results: dict[str, tuple[float, float, float]], quick: bool) -> None:
    ratio = results["TopK"][1] / results["HardThreshold"][1]
    report.claim(
        "EF-GD-star: total error at equal volume",
        "at least 20 times smaller" if not quick else "smaller",
        f"{ratio:.1f} times smaller",
        ratio >= (20 if not quick else 1),
    )


def plot(report: Report, path: Path) -> None:
    """Loss against steps; the network's accuracy in NAME-network.png."""
    plot_curves(report, path, xlabel="step", ylabel="$f - f^*$", panels=("EF-GD-star", "EF-GD:"))
    plot_network(report, path.with_name(f"{report.name}-network.png"))
