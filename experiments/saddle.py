"""Compressed SGD that escapes saddle points (Avdiukhin, Yaroslavtsev, NeurIPS 2021).

A strict saddle, f(x) = x^T diag(-0.1, 1, ..., 1) x / 2 + x_0^4 / 4 in 100 dimensions, started at 0
exactly, where the gradient is 0. Claims: without noise nobody leaves; with it compressed SGD leaves
in about as many steps as SGD and sends a fraction; RandomK with shared randomness sends no indices;
a reset by "flush" keeps the virtual iterate, one by "drop" does not. Then an autoencoder.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import ef_horovod as ef
from ef_horovod.methods.perturbed import normal
from experiments import saddle_autoencoder
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
    """Run the cases; quick: some of them, one seed."""
    seeds = range(1 if quick else 5)
    report = Report(
        "saddle", {"workers": WORKERS, "step": STEP, "noise": NOISE, "seeds": len(seeds)}
    )
    spread: dict[str, float] = {}
    chosen = ("none", "RandomK 10 %", "Top-k 1 %") if quick else tuple(CASES)
    for name in chosen:
        compressor, reset_every, expected = CASES[name]
        limit = 2 * expected[1]
        runs = [_escape(workers, compressor, reset_every, NOISE, seed, limit) for seed in seeds]
        counts = [len(history) for history in runs]
        steps = median(counts)
        sent = median(history[-1]["bytes_sent"] for history in runs)
        spread[name] = steps * _numbers(compressor)
        report.row(
            problem="strict saddle",
            method=name,
            **{"steps to escape": f"{steps:g}", "least to most": f"{min(counts)} to {max(counts)}"},
            **{"numbers sent": f"{spread[name]:,.0f}", "bytes sent": f"{sent:,.0f}"},
        )
        gaps = [entry["gap"] for entry in runs[0]]
        report.curve(f"strict saddle: {name}", range(len(gaps)), gaps)
        low, high = 0.75 * expected[0], 1.25 * expected[1]
        report.claim(
            f"{name}: steps to 0.9 of the minimum",
            f"{expected[0]} to {expected[1]}, a quarter around",
            f"{steps:g}",
            low <= steps <= high,
        )
    _claims(report, workers, spread)
    if workers.leads:  # nothing is sent for these
        _virtual_iterate(report)
    saddle_autoencoder.check(report, workers, data, quick)
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
    for name in spread:
        history = _escape(workers, CASES[name][0], None, 0.0, 0, limit=100)
        still = all(entry["norm"] == 0 for entry in history)
        report.claim(f"{name}, no noise", "stays at 0", "stays" if still else "moves", still)
    random_k, k = ef.RandomK(0.1), D // 10
    header = random_k.nbytes(D) - 4 * k
    report.claim(
        "RandomK sends no indices, whatever k",
        "4 k bytes and a constant",
        f"{random_k.nbytes(D)} = 4 * {k} + {header}",
        ef.RandomK(0.2).nbytes(D) == 4 * 2 * k + header and random_k.allreducible,
    )


def _virtual_iterate(report: Report) -> None:
    """x - eta mean_i e_i takes the steps of noisy SGD without compression, across a flush."""
    compressor, resets = ef.TopK(ratio=0.1), 50
    for reset in ("flush", "drop"):
        before, after, error = _off_virtual(compressor, reset, resets, steps=200)
        kept = after < 1e-5
        report.claim(
            f"{compressor}, {reset} every {resets}: virtual iterate against plain noisy steps",
            "off by < 1e-05, rounding" if reset == "flush" else "off by > 0.01",
            f"{before:.1e} until the first reset, {after:.1e} after 4; error then {error:g}",
            kept if reset == "flush" else before < 1e-5 and after > 0.01,
        )


def _off_virtual(
    compressor: ef.Compressor, reset: str, resets: int, steps: int
) -> tuple[float, float, float]:
    """The deviation before the first reset and at the end, relative to the largest coordinate of
    the plain steps, and the largest entry that is left of the errors."""
    method = ef.PerturbedCompressedSGD(compressor, NOISE, resets, reset)
    states = [method.init(np.zeros(D, np.float32))[0] for _ in range(WORKERS)]
    server = method.init(np.zeros(D, np.float32))[1]
    x, plain, off = np.zeros(D), np.zeros(D), []
    for t in range(steps):
        keys = [ef.Key(0, t, 0, i, WORKERS) for i in range(WORKERS)]
        gradients = [gradient(i, x, t).astype(np.float32) for i in range(WORKERS)]
        noises = [NOISE * normal(D, key).astype(np.float64) for key in keys]
        plain -= STEP * (np.mean(gradients, 0, np.float64) + np.mean(noises, 0))
        pushed = [method.push(s, g, k) for s, g, k in zip(states, gradients, keys, strict=True)]
        direction, server = method.reduce(server, [m for m, _ in pushed], keys[0].of_server())
        states = [method.pull(state, direction)[1] for _, state in pushed]
        x = x - STEP * direction
        error = np.mean([state.error for state in states], 0, np.float64)
        off.append(float(np.abs(x - STEP * error - plain).max() / np.abs(plain).max()))
    return max(off[: resets - 1]), off[-1], float(np.abs(error).max())


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
    limit: int,
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
    """How far above the minimum, and the autoencoder's loss, against steps."""
    plot_curves(
        report,
        path,
        xlabel="step",
        ylabel="$f(x) - \\min f$, or loss",
        panels=("strict saddle", "autoencoder"),
    )
