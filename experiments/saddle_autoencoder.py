"""An autoencoder started near zero, where all weights are a saddle point.

256 inputs, 8 hidden units, tanh, no biases: 4096 weights. At zero the gradient is zero, and the
Hessian has the eigenvalues of the covariance with both signs, so the saddle is strict.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import ef_horovod as ef
from experiments.claims import Report
from experiments.small_networks import Images, Network, load_images
from experiments.workers import Workers

COUNT, WORKERS, BATCH, HIDDEN = 1600, 4, 32, 8
NOISE, START = 0.01, 1e-3
GROWTH = 0.08  # of what leaves the saddle, in a step: the step size times the largest curvature
SEEN = 400  # images that the loss is measured on
# method: (compressor, reset_every, steps at most, how many times fewer bytes are claimed)
CASES: dict[str, tuple[ef.Compressor, int | None, int, int]] = {
    "none": (ef.Identity(), None, 900, 1),
    "RandomK 10 %": (ef.RandomK(0.1), None, 900, 5),
    "Top-k 1 %": (ef.TopK(ratio=0.01), None, 1800, 5),
    "Top-k 1 %, flush every 50": (ef.TopK(ratio=0.01), 50, 900, 5),
}


class Autoencoder:
    """The problem: each worker has a quarter of the images.

    Args:
        data: folder with the images.
        share: of what the principal components explain; who has gained so much has escaped.
    """

    def __init__(self, data: Path, share: float) -> None:
        self.images = load_images(data, COUNT)
        self.network = Network((256, HIDDEN, 256), "inputs")
        self._some = Images(self.images.pixels[:SEEN], self.images.labels[:SEEN], "")
        variances = np.linalg.svd(self._some.pixels, compute_uv=False) ** 2 / SEEN
        self.step = GROWTH / float(variances[0])
        self.at_zero = float(np.sum(self._some.pixels**2) / (2 * SEEN))
        self.escaped = self.at_zero - share * float(variances[:HIDDEN].sum()) / 2

    def gradient(self, worker: int, x: np.ndarray, step: int) -> np.ndarray:
        """float32[d] on a minibatch that follows from worker and step."""
        own = COUNT // WORKERS
        rows = worker * own + np.random.default_rng((worker, step)).integers(0, own, BATCH)
        batch = Images(self.images.pixels[rows], self.images.labels[rows], "")
        return self.network.gradient(x.astype(np.float32), batch)

    def loss(self, x: np.ndarray) -> float:
        return self.network.loss(x.astype(np.float32), self._some)


def check(report: Report, workers: Workers, data: Path, quick: bool) -> None:
    """Rows, curves and verdicts."""
    share = 0.25 if quick else 0.5
    problem = Autoencoder(data, share)
    report.settings["autoencoder"] = (
        f"{problem.network.d} weights, {problem.images.source}, step {problem.step:.2g}, "
        f"noise {NOISE:g}, escaped at a loss of {problem.escaped:.1f}: {problem.at_zero:.1f} at "
        f"zero less {share:.0%} of what {HIDDEN} principal components explain"
    )
    chosen = list(CASES)[: 2 if quick else None]
    ends = {
        name: _escape(workers, problem, name, NOISE, CASES[name][2] // (2 if quick else 1))
        for name in chosen
    }
    for name, history in ends.items():
        last = history[-1]
        escaped = last["loss"] < problem.escaped
        report.row(problem="autoencoder", method=name,
                   **{"steps to escape": f"{len(history)}" if escaped else "stays"},
                   **{"bytes sent": f"{last['bytes_sent']:,.0f}"})  # fmt: skip
        report.curve(f"autoencoder: {name}", range(len(history)), [e["loss"] for e in history])
        saved = ends["none"][-1]["bytes_sent"] / last["bytes_sent"]
        factor = CASES[name][3]
        if name != "none":
            report.claim(
                f"autoencoder, {name}: escapes with fewer bytes", f"{factor} times fewer",
                f"{saved:.1f}" if escaped else "stays", escaped and saved >= factor,
            )  # fmt: skip
    for name in chosen:
        still = _escape(workers, problem, name, 0.0, 50, start=0.0)
        moved = max(entry["norm"] for entry in still)
        report.claim(f"autoencoder, {name}: without noise, started at zero", "stays",
                     "stays" if moved == 0 else "moves", moved == 0)  # fmt: skip


def _escape(
    workers: Workers,
    problem: Autoencoder,
    name: str,
    noise: float,
    limit: int,
    start: float = START,
) -> list[dict[str, Any]]:
    """History until the loss is below `problem.escaped`, or for `limit` steps."""
    compressor, reset_every, *_ = CASES[name]
    history = workers.run(
        ef.PerturbedCompressedSGD(compressor, noise=noise, reset_every=reset_every),
        problem.gradient,
        problem.network.start(start).astype(np.float64),
        workers=WORKERS,
        steps=limit,
        step_size=problem.step,
        observe=lambda x: {"loss": problem.loss(x), "norm": float(np.abs(x).max())},
        stop=lambda entry: entry["loss"] < problem.escaped,
    )
    arrived = [entry["loss"] < problem.escaped for entry in history]
    return history[: arrived.index(True) + 1] if any(arrived) else history
