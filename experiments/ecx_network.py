"""Momentum, STORM and IGT on a network of 4256 weights that classifies small images.

256 inputs, 16 hidden units, tanh, softmax. The step sizes come from a sweep over 0.1 to 5 with one
seed: about the best ones of the uncompressed methods, and for IGT one that is too large for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import ef_horovod as ef
from ef_horovod.methods import estimators
from experiments.claims import Report
from experiments.ecx_regression import DECAY, WORKERS, Case, short
from experiments.ecx_variants import variants
from experiments.small_networks import Images, Network, load_images
from experiments.workers import Workers

COUNT, EVERY = 1600, 10
STORM, IGT = estimators.STORM(DECAY), estimators.IGT(0.05)
CASES = [
    Case("momentum", estimators.Estimator(), 0.05, ef.OneBit(), 0.6, 16, 150),
    Case("STORM", STORM, DECAY, ef.OneBit(), 0.6, 16, 150),
    Case("STORM", STORM, DECAY, ef.TopK(ratio=0.01), 0.2, 16, 150),
    Case("IGT", IGT, 0.05, ef.OneBit(), 0.6, 16, 150),
    Case("IGT", IGT, 0.05, ef.OneBit(), 5.0, 16, 150),
    Case("IGT", IGT, 0.05, ef.TopK(ratio=0.01), 0.6, 16, 150),
]


def images(data: Path) -> Images:
    """What is classified."""
    return load_images(data, COUNT)


def panels() -> list[str]:
    """For the plot."""
    return [f"network: {CASES[i].name}" for i in (0, 3)]


def compare(report: Report, workers: Workers, content: Images, quick: bool) -> None:
    """Rows, curves and verdicts."""
    for case in CASES[:1] if quick else CASES:
        case = case._replace(steps=20) if quick else case
        methods = variants(case.compressor, case.alpha)
        ends = {
            name: _train(report, workers, content, case, name, method)
            for name, method in methods.items()
        }
        shown = {name: f"{end:.3f}" if end < 100 else "diverges" for name, end in ends.items()}
        report.row(what=f"network: {case.what}", compressor=short(case.compressor),
                   step=f"{case.step:g}", batch=case.batch, **shown)  # fmt: skip
        if not quick:
            _judge(report, case, ends)


def _judge(report: Report, case: Case, ends: dict[str, float]) -> None:
    # Momentum without the filter, the others with it: what the regression asks for.
    best = "ECX" if case.what == "momentum" else "ECX, filter 0.3"
    plain, ec, ecx = ends["uncompressed"], ends["EC"], ends[best]
    report.claim(
        f"network: {case.name}: EC is slower than uncompressed, {best} is not",
        f"EC > {1.05 * plain:.3f} >= ECX, 5 % above uncompressed",
        f"uncompressed {plain:.3f}, EC {ec:.3f}, ECX {ecx:.3f}",
        ec > 1.05 * plain >= ecx,
    )


def _train(
    report: Report,
    workers: Workers,
    content: Images,
    case: Case,
    name: str,
    method: ef.Method,
) -> float:
    """The mean loss over the last tenth of the steps, on all images; infinite if it diverged."""
    network, own, losses = Network((256, 16, 10), "classes"), COUNT // WORKERS, []
    seen = [0]

    def gradient(worker: int, x: np.ndarray, step: int) -> np.ndarray:
        rows = worker * own + np.random.default_rng((worker, step)).integers(0, own, case.batch)
        batch = Images(content.pixels[rows], content.labels[rows], "")
        return network.gradient(x.astype(np.float32), batch)

    def observe(x: np.ndarray) -> dict[str, Any]:
        seen[0] += 1
        if seen[0] % EVERY == 0:
            losses.append(network.loss(x.astype(np.float32), content))
        return {}

    try:
        workers.run(
            method,
            gradient,
            network.start().astype(np.float64),
            workers=WORKERS,
            steps=case.steps,
            step_size=case.step,
            estimator=case.estimator,
            observe=observe,
        )
    except ef.NonFiniteError:
        losses.append(float("inf"))
    finite = [loss for loss in losses if loss < 100]
    points = range(EVERY, EVERY * len(finite) + 1, EVERY)
    report.curve(f"network: {case.name}: {name}", points, finite)
    return float(np.mean(losses[-max(case.steps // EVERY // 10, 1) :]))
