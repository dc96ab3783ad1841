"""DoubleSqueeze and its baselines (Tang, Lian, Yu, Zhang, Liu, ICML 2019) on logistic regression.

a9a, 8 workers, batches of 32, the learning rate divided by ten half way. Claim: compression on both
ways with two error memories ends where uncompressed SGD does; without memory it stalls far above.
A small network follows in `doublesqueeze_network`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import ef_horovod as ef
from ef_horovod import theory
from experiments.claims import Report, plot_curves
from experiments.convex import minimiser
from experiments.doublesqueeze_network import add_network, plot_network, prepare
from experiments.libsvm import load_problem
from experiments.workers import Workers

WORKERS, BATCH, ROWS, L2 = 8, 32, 32_000, 1e-4
RATES = (0.5, 2.0)


def methods() -> dict[str, ef.Method]:
    """The paper's method and its baselines; `QSGD(1)` is ternary, the paper's QSGD."""
    sign, top, ternary = ef.OneBit(scale="l2"), ef.TopK(k=4), ef.QSGD(levels=1, bucket=None)
    return {
        "SGD": ef.NoFeedback(ef.Identity()),
        "DoubleSqueeze, 1 bit": ef.DoubleSqueeze(sign, server_compressor=sign),
        "DoubleSqueeze, 1 bit l1": ef.DoubleSqueeze(ef.OneBit(), server_compressor=ef.OneBit()),
        "DoubleSqueeze, top 4": ef.DoubleSqueeze(top, server_compressor=top),
        "MEM-SGD, 1 bit": ef.ErrorFeedback(sign),
        "MEM-SGD, top 4": ef.ErrorFeedback(top),
        "QSGD, no memory": ef.NoFeedback(ternary),
        "Top-4 SGD, no memory": ef.NoFeedback(top, server_compressor=top),
        "1 bit, no memory": ef.NoFeedback(sign, server_compressor=sign),
    }


# f - f* at the end for learning rates 0.5 and 2.0
EXPECTED = {
    "SGD": (7.1e-4, 5.9e-4),
    "DoubleSqueeze, 1 bit": (6.9e-4, 5.8e-4),
    "DoubleSqueeze, 1 bit l1": (6.8e-4, 5.3e-4),
    "DoubleSqueeze, top 4": (7.2e-4, 5.4e-4),
    "MEM-SGD, 1 bit": (7.0e-4, 5.7e-4),
    "MEM-SGD, top 4": (7.1e-4, 5.8e-4),
    "Top-4 SGD, no memory": (3.2e-2, 2.7e-2),
    "1 bit, no memory": (6.1e-2, 7.7e-2),
}


def run(workers: Workers, data: Path, quick: bool) -> Report:
    """All methods at each rate; quick: one rate, fewer rounds."""
    network = prepare(workers, data, quick)  # first, for it may miss something
    rounds = 400 if quick else 4000
    report = Report(
        "doublesqueeze",
        {"data": "a9a", "workers": WORKERS, "batch": BATCH, "rounds": rounds, "l2": L2},
    )
    problem = _problem(data)
    best = problem.mean_value(minimiser(problem))
    for rate in RATES[:1] if quick else RATES:
        ends = {
            name: _train(report, workers, problem, best, name, method, rate, rounds)
            for name, method in methods().items()
        }
        _judge(report, ends, rate, quick)
    if network is not None:
        add_network(report, network, quick)
    return report


def _problem(data: Path) -> theory.Problem:
    whole = load_problem(data, "a9a", 1, regulariser="l2", lam=L2).shards[0]
    rows = np.random.default_rng(0).permutation(len(whole.labels))[:ROWS]
    shards = theory.contiguous_shards(whole.features[rows], whole.labels[rows], WORKERS)
    return theory.Problem(shards, regulariser="l2", lam=L2)


def _train(
    report: Report,
    workers: Workers,
    problem: theory.Problem,
    best: float,
    name: str,
    method: ef.Method,
    rate: float,
    rounds: int,
) -> float:
    """The mean of f - f* over the last tenth."""

    def gradient(worker: int, x: np.ndarray, step: int) -> np.ndarray:
        rng = np.random.default_rng((worker, step))
        return problem.batch_gradient(
            worker, x, rng.integers(0, len(problem.shards[worker].labels), BATCH)
        )

    iterates: list[np.ndarray] = []
    history = workers.run(
        method,
        gradient,
        np.zeros(problem.features[0].shape[1]),
        workers=WORKERS,
        steps=rounds,
        step_size=lambda step: rate if step < rounds // 2 else rate / 10,
        observe=lambda x: iterates.append(x) or {},
    )
    shown = range(0, rounds, max(rounds // 100, 1))
    gaps = [problem.mean_value(iterates[step]) - best for step in shown]
    report.curve(f"learning rate {rate:g}: {name}", shown, gaps)
    end = float(np.mean(gaps[-10:]))
    up, down = _bytes(method, problem.features[0].shape[1])
    report.row(
        method=name,
        rate=f"{rate:g}",
        **{"f - f* half way": f"{gaps[len(gaps) // 2 - 1]:.1e}", "f - f*": f"{end:.1e}"},
        **{"bytes up": up, "bytes down": down},
        **{"sent to all others": f"{history[-1]['bytes_sent']:,}"},
    )
    return end


def _bytes(method: Any, d: int) -> tuple[int, int]:
    """A message to a server and its answer."""
    down = getattr(method, "server_compressor", None) or ef.Identity()
    return method.compressor.nbytes(d), down.nbytes(d)


def _judge(report: Report, ends: dict[str, float], rate: float, quick: bool) -> None:
    which = RATES.index(rate)
    factor = 3.0 if quick else 1.5
    for name, expected in EXPECTED.items():
        if name == "SGD":
            continue
        stalls = "no memory" in name
        limit = 10 if not quick else 1
        report.claim(
            f"rate {rate:g}: {name} " + ("stalls" if stalls else "ends where SGD does"),
            f"{expected[which]:.1e} at SGD's {EXPECTED['SGD'][which]:.1e}",
            f"{ends[name]:.1e} at SGD's {ends['SGD']:.1e}",
            ends[name] > limit * ends["SGD"] if stalls else ends[name] < factor * ends["SGD"],
        )


def plot(report: Report, path: Path) -> None:
    """Loss against rounds; the network's in NAME-network.png."""
    panels = [f"learning rate {r:g}" for r in RATES]
    shown = [p for p in panels if any(label.startswith(p) for label in report.curves)]
    plot_curves(report, path, xlabel="round", ylabel="$f - f^*$", panels=shown)
    plot_network(report, path.with_name(f"{report.name}-network.png"))
