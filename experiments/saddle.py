"""Compressed SGD that escapes saddle points (Avdiukhin, Yaroslavtsev, NeurIPS 2021).

A strict saddle, f(x) = x^T diag(-0.1, 1, ..., 1) x / 2 + x_0^4 / 4 in 100 dimensions, started at 0
exactly, where the gradient is 0. Claims: without noise nobody leaves; with it compressed SGD leaves
in about as many steps as SGD and sends a fraction; RandomK with shared randomness sends no indices.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import ef_horovod as ef
from experiments.claims import Report, plot_curves
from experiments.workers import Workers

D, WORKERS, STEP, NOISE = 100, 4, 0.1, 0.01
CURVATURE = np.array([-0.1] + [1.0] * (D - 1))
MINIMUM = -0.0025
# method: (compressor, reset_every, iterations in the specification)
CASES: dict[str, tuple[ef.Compressor, int | None, tuple[int, int]]] = {
    "none": (ef.Identity(), None, (523, 696)),
    "RandomK 10 %": (ef.RandomK(0.1), None, (628, 814)),
    "Top-k 10 %": (ef.TopK(ratio=0.1), None, (531, 706)),
    "Top-k 1 %": (ef.TopK(ratio=0.01), None, (639, 1053)),
    "Top-k 10 %, flush every 50": (ef.TopK(ratio=0.1), 50, (537, 702)),
}


def value(x: np.ndarray) -> float:
    return float(CURVATURE @ x**2 / 2 + x[0] ** 4 / 4)


def gradient(worker: int, x: np.ndarray, step: int) -> np.ndarray:
    g = CURVATURE * x
    g[0] += x[0] ** 3
    return g


def run(workers: Workers, data: Path, quick: bool) -> Report:
    """Run the cases; quick: one seed."""
    seeds = range(1 if quick else 5)
    report = Report(
        "saddle", {"workers": WORKERS, "step": STEP, "noise": NOISE, "seeds": len(seeds)}
    )
    spread: dict[str, float] = {}
    for name, (compressor, reset_every, expected) in CASES.items():
        runs = [_escape(workers, compressor, reset_every, NOISE, seed) for seed in seeds]
        steps = median(len(history) for history in runs)
        sent = median(history[-1]["bytes_sent"] for history in runs)
        spread[name] = steps * _numbers(compressor)
        report.row(
            method=name,
            **{"steps to escape": f"{steps:g}", "numbers sent": f"{spread[name]:,.0f}"},
            **{"bytes sent": f"{sent:,.0f}"},
        )
        report.curve(name, range(len(runs[0])), [e["gap"] for e in runs[0]])
        low, high = 0.75 * expected[0], 1.25 * expected[1]
        report.claim(
            f"{name}: steps to 0.9 of the minimum",
            f"{expected[0]} to {expected[1]}, a quarter around",
            f"{steps:g}",
            low <= steps <= high,
        )
    _claims(report, workers, spread)
    return report


def _claims(report: Report, workers: Workers, spread: dict[str, float]) -> None:
    for name, factor in (("RandomK 10 %", 5), ("Top-k 1 %", 40)):
        saved = spread["none"] / spread[name]
        report.claim(
            f"{name} escapes with fewer numbers sent",
            f"{factor} times fewer",
            f"{saved:.1f}",
            saved > factor,
        )
    for name, (compressor, _, _) in CASES.items():
        history = _escape(workers, compressor, None, 0.0, 0, limit=300)
        still = all(entry["norm"] == 0 for entry in history)
        report.claim(f"{name}, no noise", "stays at 0", "stays" if still else "moves", still)
    random_k, k = ef.RandomK(0.1), D // 10
    header = random_k.nbytes(D) - 4 * k
    report.claim(
        "RandomK sends no indices, whatever k",
        "4 k bytes and a constant",
        f"{random_k.nbytes(D)} = 4 * {k} + {header}",
        ef.RandomK(0.2).nbytes(D) == 4 * 2 * k + header and random_k.linear,
    )


def _numbers(compressor: ef.Compressor) -> int:
    """Entries in a message; in so few dimensions headers are a large part of its bytes."""
    x = np.random.default_rng(0).normal(size=D).astype(np.float32)
    return int(np.count_nonzero(compressor.compress(x).decompress()))


def _escape(
    workers: Workers,
    compressor: ef.Compressor,
    reset_every: int | None,
    noise: float,
    seed: int,
    limit: int = 3000,
) -> list[dict[str, Any]]:
    """History until f < 0.9 of its minimum, or for `limit` steps."""
    history = workers.run(
        ef.PerturbedCompressedSGD(compressor, noise=noise, reset_every=reset_every),
        gradient,
        np.zeros(D),
        workers=WORKERS,
        steps=limit,
        step_size=STEP,
        seed=seed,
        observe=lambda x: {"gap": value(x) - MINIMUM, "norm": float(np.abs(x).max())},
        stop=lambda entry: entry["gap"] < -0.1 * MINIMUM,
    )
    arrived = [entry["gap"] < -0.1 * MINIMUM for entry in history]
    return history[: arrived.index(True) + 1] if any(arrived) else history


def plot(report: Report, path: Path) -> None:
    """How far above the minimum, against steps."""
    plot_curves(report, path, xlabel="step", ylabel="$f(x) - \\min f$")
