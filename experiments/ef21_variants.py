"""EF21's kin: Bells & Whistles (2021) and Momentum Provably Improves Error Feedback (NeurIPS 2023).

Logistic regression on phishing, 20 workers, a nonconvex regulariser. Claims: each variant is EF21
where its option is trivial; partial participation (PP) and compression on both ways (BC) converge
with steps that theory allows, and with tuned ones; PAGE gets there with a fraction of the sample
gradients; noise stops EF21-SGD at a floor that no step size lowers, and momentum (SGDM) lowers it.

Polyak's momentum (HB) and proximal steps are the optimizer's business, not the method's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import ef_horovod as ef
from ef_horovod import theory
from ef_horovod.methods.estimators import PAGE
from experiments.claims import Report, plot_curves
from experiments.descent import add_row, descend, judge_bound, largest_gap
from experiments.libsvm import load_problem
from experiments.workers import Workers

WORKERS = 20
TARGET = 1e-6  # of ||grad f||^2
TOP = ef.TopK(k=1)
QUARTER = ef.TopK(ratio=0.25)
# step size: steps, and the tail means of ||grad f||^2 for eta = 1 and 0.01 in the specification
PLANE = {
    1e-2: (20_000, 4.5e-2, 2.0e-2),
    1e-3: (50_000, 2.3e-2, 2.2e-3),
    1e-4: (100_000, 1.7e-2, 1.8e-4),
}
# step size: steps on phishing
NOISY = {0.1: 2000, 0.03: 3000, 0.01: 5000}


def run(workers: Workers, data: Path, quick: bool) -> Report:
    """All parts; quick: fewer cases of each."""
    report = Report(
        "ef21-variants",
        {"data": "phishing", "workers": WORKERS, "start": "normal, seed 0", "target": TARGET},
    )
    problem = load_problem(data, "phishing", WORKERS)
    x0 = np.random.default_rng(0).normal(size=problem.features[0].shape[1])
    _trivial_options(report, workers, problem, x0, 10 if quick else 100)
    with_theory = _theory(report, workers, problem, x0, quick)
    _judge_theory(report, with_theory)
    tuned = _tuned(report, workers, problem, x0, quick)
    _judge_tuned(report, tuned)
    _plane(report, workers, quick)
    _noisy(report, workers, problem, x0, quick)
    return report


class Batches:
    """Gradients of batches, drawn by worker and step alone; counts those of single samples.

    Args:
        problem: whose rows.
        size: of a batch.
        page: whose whole steps take all rows.
    """

    def __init__(self, problem: theory.Problem, size: int, page: PAGE | None = None) -> None:
        self.problem, self.size, self.page = problem, size, page

    def gradient(self, worker: int, x: np.ndarray, step: int) -> np.ndarray:
        if self.page is not None and self.page.whole(step):
            return self.problem.gradient(worker, x)
        rows = len(self.problem.shards[worker].labels)
        chosen = np.random.default_rng((worker, step)).integers(0, rows, self.size)
        return self.problem.batch_gradient(worker, x, chosen)

    def samples(self, rounds: int) -> int:
        """Gradients of single samples that a worker took in so many rounds."""
        rows = len(self.problem.shards[0].labels)
        whole = sum(self.page is None or self.page.whole(step) for step in range(rounds))
        return whole * rows + (rounds - whole) * 2 * self.size


def _trivial_options(
    report: Report, workers: Workers, problem: theory.Problem, x0: np.ndarray, rounds: int
) -> None:
    """Section 7 of the specification; rounding is that of float32."""
    step = 16 * theory.ef21_step(problem.smoothness(), 1 / len(x0))
    plain, batch = ef.EF21(TOP), {"gradient": Batches(problem, 4).gradient}
    gd, page = ef.NoFeedback(ef.Identity()), {"estimator": PAGE(1.0)}
    both, weights = (
        ef.EF21(TOP, server_compressor=ef.Identity()),
        ef.EF21(TOP, weights=(3,) * WORKERS),
    )
    pairs: list[tuple[str, bool, ef.Method, dict[str, Any], ef.Method, dict[str, Any]]] = [
        ("PP with all workers is EF21", True, ef.EF21(TOP, participation=1.0), {}, plain, {}),
        ("PAGE with p = 1 is EF21", True, plain, page, plain, {}),
        ("SGDM with eta = 1 is EF21-SGD", True, ef.EF21(TOP, momentum=1.0), batch, plain, batch),
        ("BC that answers with all is EF21", False, both, {}, plain, {}),
        ("W with equal L_i is EF21", False, weights, {}, plain, {}),
        ("without compression EF21 is GD", False, ef.EF21(ef.Identity()), {}, gd, {}),
    ]
    for name, bitwise, one, options, other, others in pairs:
        a = descend(workers, problem, one, step, x0, rounds, **options)
        b = descend(workers, problem, other, step, x0, rounds, **others)
        gap = largest_gap(a, b)
        report.claim(
            f"{name}, {rounds} rounds",
            "the same bits" if bitwise else "apart by rounding, < 1e-5",
            f"apart by {gap:.1g}" if gap else "the same bits",
            gap == 0 if bitwise else gap < 1e-5,
        )


def _theory(
    report: Report, workers: Workers, problem: theory.Problem, x0: np.ndarray, quick: bool
) -> dict[str, int | None]:
    """{variant: rounds} with the steps of the theorems, a quarter of the entries kept."""
    constants, alpha, found = problem.smoothness(), QUARTER.contraction(len(x0)), {}
    steps: dict[str, tuple[ef.Method, float, int, float | None]] = {
        "EF21": (ef.EF21(QUARTER), theory.ef21_step(constants, alpha), 250, alpha)
    }
    for p in (0.5,) if quick else (0.5, 0.25):
        best = theory.pp_best_s(alpha, p)
        step = theory.ef21_pp_step(constants, alpha, p, s=best, rho=best)
        method = ef.EF21(QUARTER, participation=p)
        steps[f"PP, p = {p:g}"] = (method, step, int(250 / p), p * alpha)
    if not quick:
        step = theory.ef21_bc_step(constants, alpha, alpha)
        steps["BC"] = (ef.EF21(QUARTER, server_compressor=QUARTER), step, 1600, None)
    for name, (method, step, rounds, contraction) in steps.items():
        run = descend(workers, problem, method, step, x0, rounds)
        found[name] = add_row(report, "steps of theory", name, run, TARGET)
        if contraction is not None:
            judge_bound(report, f"{name}, step of theory", run, problem, x0, contraction)
    return found


def _judge_theory(report: Report, found: dict[str, int | None]) -> None:
    for name, rounds in found.items():
        report.claim(
            f"{name} converges with its step of theory",
            f"grad squared < {TARGET:g}",
            f"after {rounds} rounds",
            rounds is not None,
        )
        if name.startswith("PP"):
            p = float(name.rpartition(" ")[2])
            ratio = (rounds or np.inf) / (found["EF21"] or np.nan)
            report.claim(
                f"{name} takes at most 1/p times the rounds of EF21",
                f"{1 / p:g} times, within 15 %",
                f"{ratio:.2f} times",
                ratio <= 1.15 / p,
            )


def _tuned(
    report: Report, workers: Workers, problem: theory.Problem, x0: np.ndarray, quick: bool
) -> dict[str, tuple[int | None, float, float]]:
    """{variant: rounds, bytes both ways, a worker's sample gradients}; multiples of EF21's step."""
    base, rows = theory.ef21_step(problem.smoothness(), 1 / len(x0)), len(problem.shards[0].labels)
    page, found = PAGE(8 / (rows + 8)), {}
    cases: dict[str, tuple[ef.Method, float, int, PAGE | None]] = {
        "EF21": (ef.EF21(TOP), 16, 450, None),
        "PAGE, batches of 8": (ef.EF21(TOP), 16, 700, page),
        "BC, top 4 down": (ef.EF21(TOP, server_compressor=ef.TopK(k=4)), 16, 700, None),
        "BC, top 1 down": (ef.EF21(TOP, server_compressor=TOP), 16, 1400, None),
        "PP, p = 0.5": (ef.EF21(TOP, participation=0.5), 8, 1200, None),
        "PP, p = 0.25": (ef.EF21(TOP, participation=0.25), 4, 2000, None),
    }
    for name in list(cases)[:3] if quick else cases:
        method, multiple, rounds, estimator = cases[name]
        batches = Batches(problem, 8, estimator)
        options = (
            {} if estimator is None else {"gradient": batches.gradient, "estimator": estimator}
        )
        run = descend(workers, problem, method, multiple * base, x0, rounds, **options)
        reached = add_row(report, "tuned steps", f"{name}, {multiple:g}x", run, TARGET)
        both = sum(run.sent(way, TARGET) or np.inf for way in ("bytes_up", "bytes_down"))
        found[name] = (reached, both, batches.samples(reached or rounds))
    return found


def _judge_tuned(report: Report, found: dict[str, tuple[int | None, float, float]]) -> None:
    _, plain_bytes, plain_samples = found["EF21"]
    for name, (rounds, both, samples) in found.items():
        report.claim(
            f"{name}: converges with a tuned step",
            f"grad squared < {TARGET:g}",
            f"after {rounds} rounds",
            rounds is not None,
        )
        if name.startswith("PAGE"):
            report.claim(
                f"{name}: sample gradients of a worker",
                f"at most a tenth of {plain_samples:,}",
                f"{samples:,}",
                rounds is not None and samples <= plain_samples / 10,
            )
        if name.startswith("BC"):
            report.claim(
                f"{name}: bytes to a server and back",
                f"at most half of {plain_bytes:,.0f}",
                f"{both:,.0f}",
                both <= plain_bytes / 2,
            )


def _plane(report: Report, workers: Workers, quick: bool) -> None:
    """Two dimensions, one worker, Top-1, f = ||x||^2 / 2 with noise of three values."""
    values = np.array([[2.0, 0.0], [0.0, 1.0], [-2.0, -1.0]])
    tails: dict[float, list[float]] = {1.0: [], 0.01: []}
    for step, (steps, *expected) in [(1e-2, (5000, 4.5e-2, 2.0e-2))] if quick else PLANE.items():
        noise = values[np.random.default_rng(0).integers(3, size=steps)]
        for (eta, found), wished in zip(tails.items(), expected, strict=True):
            history = workers.run(
                ef.EF21(TOP, momentum=eta),
                lambda worker, x, t, noise=noise: x + noise[t],
                np.array([0.0, -0.01]),
                workers=1,
                steps=steps,
                step_size=step,
                observe=lambda x: {"norm": float(x @ x)},
            )
            found.append(float(np.mean([entry["norm"] for entry in history[steps // 2 :]])))
            report.claim(
                f"two dimensions, eta {eta:g}, step {step:g}: the tail's mean of grad squared",
                f"{wished:.1e} within a factor of 2",
                f"{found[-1]:.1e}",
                wished / 2 <= found[-1] <= 2 * wished,
            )
    if not quick:
        _judge_noise(report, "two dimensions", tails)


def _noisy(
    report: Report, workers: Workers, problem: theory.Problem, x0: np.ndarray, quick: bool
) -> None:
    """Batches of one sample, started where ||grad f|| is 0: what remains is made by noise."""
    start, L = x0, problem.smoothness().L
    for _ in range(400):
        start = start - problem.mean_gradient(start) / L
    tails: dict[float, list[float]] = {1.0: [], 0.1: []}
    for step, steps in [(0.1, 150), (0.03, 400)] if quick else NOISY.items():
        for eta, found in tails.items():
            method, gradient = ef.EF21(TOP, momentum=eta), Batches(problem, 1).gradient
            history = workers.run(
                method,
                gradient,
                start,
                workers=WORKERS,
                steps=steps,
                step_size=step,
                observe=lambda x: {"x": x},
            )
            looked = range(0, steps, max(steps // 200, 1))
            norms = workers.map(
                lambda x: float(np.sum(problem.mean_gradient(x) ** 2)),
                [history[t]["x"] for t in looked],
            )
            report.curve(f"batches of 1: eta {eta:g}, step {step:g}", looked, norms)
            found.append(float(np.mean(norms[len(norms) // 2 :])))
            report.row(
                part="batches of 1",
                method=f"EF21-SGD{'M' if eta < 1 else ''}, eta {eta:g}",
                step=f"{step:g}",
                rounds=f"{steps:,}",
                **{"bytes up": f"{history[-1]['bytes_up']:,.0f}"},
                **{"bytes down": f"{history[-1]['bytes_down']:,.0f}"},
                **{"tail's grad squared": f"{found[-1]:.1e}"},
            )
    _judge_noise(report, "phishing, batches of 1", tails)


def _judge_noise(report: Report, name: str, tails: dict[float, list[float]]) -> None:
    sgd, momentum = tails[1.0], tails[min(tails)]
    report.claim(
        f"{name}: smaller steps do not take EF21-SGD below its floor",
        "the last at least a quarter of the first",
        ", ".join(f"{tail:.1e}" for tail in sgd),
        sgd[-1] >= sgd[0] / 4,
    )
    report.claim(
        f"{name}: they take SGDM down",
        "the last at most half of the first",
        ", ".join(f"{tail:.1e}" for tail in momentum),
        momentum[-1] <= momentum[0] / 2,
    )
    report.claim(
        f"{name}: SGDM ends below EF21-SGD at the smallest step",
        "at least 5 times",
        f"{sgd[-1] / momentum[-1]:.0f} times",
        sgd[-1] >= 5 * momentum[-1],
    )


def plot(report: Report, path: Path) -> None:
    """Squared gradient norm against rounds."""
    panels = ("steps of theory", "tuned steps", "batches of 1")
    plot_curves(report, path, xlabel="round", ylabel="$||\\nabla f(x)||^2$", panels=panels)
