"""Runs towards a small gradient, and what the papers' theorems promise about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import ef_horovod as ef
from ef_horovod import theory
from experiments.claims import Report
from experiments.workers import Workers


@dataclass(frozen=True)
class Descent:
    """A run, seen through its gradients.

    Args:
        norms: float64[T + 1], ||grad f||^2 at x^0, ..., x^T.
        history: of `Workers.run`.
        step: its step size.
    """

    norms: np.ndarray
    history: list[dict[str, Any]]
    step: float

    def rounds(self, target: float) -> int | None:
        """The first t with ||grad f(x^t)||^2 <= target, if any."""
        reached = self.norms <= target
        return int(np.argmax(reached)) if reached.any() else None

    def sent(self, what: str, target: float) -> float | None:
        """Bytes sent up to there; `what` is "bytes_up", "bytes_down" or "bytes_sent"."""
        rounds = self.rounds(target)
        return None if rounds is None else self.history[rounds - 1][what] if rounds else 0.0


def descend(
    workers: Workers,
    problem: theory.Problem,
    method: ef.Method,
    step: float,
    x0: np.ndarray,
    rounds: int,
    *,
    target: float | None = None,
    gradient: Callable[[int, np.ndarray, int], np.ndarray] | None = None,
    crew: int | None = None,
    **options: Any,
) -> Descent:
    """Run for some rounds, or until ||grad f||^2 <= target where one is given.

    Args:
        workers: where.
        problem: f, and the workers' gradients unless `gradient` is given.
        method: with its compressor.
        step: its step size.
        x0: float64[d].
        rounds: at most.
        target: of ||grad f||^2; looking at each iterate takes long on large data.
        gradient: of `Workers.run`.
        crew: number of workers, if it is not the problem's.
        options: of `Workers.run`.
    """

    def norm(x: np.ndarray) -> float:
        return float(np.sum(problem.mean_gradient(x) ** 2))

    history = workers.run(
        method,
        gradient or problem.gradient,
        x0,
        steps=rounds,
        step_size=step,
        observe=(lambda x: {"x": x}) if target is None else (lambda x: {"norm": norm(x)}),
        stop=None if target is None else (lambda entry: entry["norm"] <= target),
        workers=crew or len(problem.shards),
        **options,
    )
    if target is None:
        norms = workers.map(norm, [entry["x"] for entry in history])
    else:
        norms = np.array([entry["norm"] for entry in history])
    return Descent(np.concatenate([[norm(x0)], norms]), history, step)


def judge_bound(
    report: Report,
    name: str,
    run: Descent,
    problem: theory.Problem,
    x0: np.ndarray,
    alpha: float,
    *,
    weighted: bool = False,
) -> None:
    """EF21's theorem: the mean of ||grad f||^2 is at most 2 f(x^0) / (step T) + G^0 / (theta T).

    f >= 0 here, and G^0 is at most (1 - alpha) times the mean of ||grad f_i(x^0)||^2.

    Args:
        report: for the verdict.
        name: what it is about.
        run: at the theorem's step or below.
        problem: its f and f_i.
        x0: its start.
        alpha: contraction; with participation p, p times the compressor's.
        weighted: for the step with L_AM: in G^0, sums over n^2 w_i take the place of means.
    """
    n, T = len(problem.shards), len(run.norms) - 1
    shares = problem.smoothness().weights if weighted else np.full(n, 1 / n)
    sizes = np.array([np.sum(problem.gradient(i, x0) ** 2) for i in range(n)])
    g0 = (1 - alpha) * np.sum(sizes / shares) / n**2
    bound = 2 * problem.mean_value(x0) / (run.step * T) + g0 / (theory.theta(alpha) * T)
    mean = run.norms[:-1].mean()
    report.claim(
        f"{name}: the theorem bounds the mean of grad squared",
        f"at most {bound:.3g}",
        f"{mean:.3g}",
        mean <= bound,
    )


def add_row(report: Report, part: str, name: str, run: Descent, target: float) -> int | None:
    """A line of the table and a curve; returns the rounds to the target."""
    rounds = run.rounds(target)
    report.row(
        part=part,
        method=name,
        step=f"{run.step:.3g}",
        rounds=f"{rounds:,}" if rounds is not None else f"> {len(run.history):,}",
        **{"bytes up": _shown(run.sent("bytes_up", target))},
        **{"bytes down": _shown(run.sent("bytes_down", target))},
    )
    every = max(len(run.norms) // 200, 1)
    report.curve(f"{part}: {name}", range(0, len(run.norms), every), run.norms[::every])
    return rounds


def relative_target(problem: theory.Problem, x0: np.ndarray, relative: float) -> float:
    """A share of ||grad f(x^0)||^2."""
    return relative * float(np.sum(problem.mean_gradient(x0) ** 2))


def largest_gap(a: Descent, b: Descent) -> float:
    """How far the iterates of two runs are apart, by the largest number in them; 0 is bitwise."""
    first, second = (np.array([entry["x"] for entry in run.history]) for run in (a, b))
    return float(np.abs(first - second).max() / np.abs(first).max())


def _shown(number: float | None) -> str:
    return "never" if number is None else f"{number:,.0f}"
