"""Table and plots of what `benchmarks/time_to_accuracy.py` measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate
from time_to_accuracy_plan import RANKS, TASKS, Results, Run, Times, best_rate

_WITHIN_POINTS, _WITHIN_PART = 0.5, 0.01  # of dense: accuracy, and loss


class Finding(NamedTuple):
    """A way at its best rate.

    Attributes:
        curves: of its seeds: step, score, and bytes that a rank sent.
        reached: steps of each seed until dense's score less a tolerance; None: never.
    """

    way: str
    lr: float
    curves: list[list[tuple[int, float, float]]]
    dense_steps: int
    reached: list[int | None]

    @property
    def scores(self) -> list[float]:
        return [curve[-1][1] for curve in self.curves]

    @property
    def steps_to_target(self) -> float | None:
        """Mean over seeds; None where one of them never came there."""
        found = [step for step in self.reached if step is not None]
        return statistics.mean(found) if len(found) == len(self.reached) else None

    @property
    def total_bytes(self) -> float:
        return self.curves[0][-1][2]


def findings(results: Results, times: Times, task: str, epochs: int) -> list[Finding]:
    """Of all ways of a task that have a run of full length, dense training first."""
    plan, found = TASKS[task], []
    target: float | None = None
    for way in plan.ways:
        lr = best_rate(results, task, way, max(1, epochs // 4))
        wanted = (Run(task, way, lr or 0.0, epochs, seed) for seed in plan.seeds)
        rows = [results[run] for run in wanted if run in results]
        if not rows:
            continue
        curves = [_curve(row, way, task, times) for row in rows]
        if target is None:  # the first way is dense
            target = _target(task, statistics.mean(curve[-1][1] for curve in curves))
        reached = [_first(curve, target, plan.higher) for curve in curves]
        found.append(Finding(way, lr or 0.0, curves, rows[0]["dense_steps"], reached))
    return found


def _target(task: str, dense: float) -> float:
    return dense - _WITHIN_POINTS if TASKS[task].higher else dense * (1 + _WITHIN_PART)


def _first(curve: Sequence[tuple[int, float, float]], target: float, higher: bool) -> int | None:
    for step, score, _ in curve:
        if (score >= target) if higher else (score <= target):
            return step
    return None


def _curve(
    row: dict[str, Any], way: str, task: str, times: Times
) -> list[tuple[int, float, float]]:
    """Bytes are those of `stats()`; for other packages what the interface counted in a step."""
    sent = next((t["compressed_wire_bytes"] for k, t in times.items() if k[:2] == (task, way)), 0)
    dense = 4 * row["parameters"] * 2 * (RANKS - 1) / RANKS * (0.5 if "fp16" in way else 1.0)
    each = sent or (dense if "PowerSGD" not in way else float("nan"))
    return [(step, score, each * step if b is None else b) for step, score, b in row["curve"]]


def seconds(times: Times, task: str, finding: Finding, rate: str, steps: float) -> float | None:
    """Seconds that `steps` take on a network; None where no time was measured."""
    row = times.get((task, finding.way, rate))
    if row is None:
        return None
    dense = min(steps, finding.dense_steps)
    first = row.get("dense_seconds", row["compressed_seconds"])
    return float(dense * first + (steps - dense) * row["compressed_seconds"])


def table(results: Results, times: Times, task: str, epochs: int) -> str:
    """A row for each way."""
    rates = sorted({rate for t, _, rate in times if t == task})
    found, rows = findings(results, times, task, epochs), []
    for one in found:
        scores, steps = one.scores, one.steps_to_target
        part = one.total_bytes / found[0].total_bytes
        digits = 2 if TASKS[task].higher else 3
        row = [one.way, one.lr, f"{statistics.mean(scores):.{digits}f}"]
        row.append(f"{min(scores):.{digits}f} to {max(scores):.{digits}f}" if scores[1:] else "")
        row += [
            "1" if part == 1 else f"1/{1 / part:.0f}",
            "never" if steps is None else f"{steps:.0f}",
        ]
        for rate in rates:
            took = None if steps is None else seconds(times, task, one, rate, steps)
            row.append("" if took is None else f"{took:.0f}")
        rows.append(row)
    heads = ["way", "rate", TASKS[task].metric, "of seeds", "bytes", "steps to target"]
    heads += [f"s at {rate}" for rate in rates]
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def plots(results: Results, times: Times, task: str, epochs: int, out: Path) -> Path:
    """Scores against steps, bytes, and seconds on each network; one file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = sorted({rate for t, _, rate in times if t == task})
    figure, panels = pyplot.subplots(1, 2 + len(rates), figsize=(5 * (2 + len(rates)), 4.5))
    for one in findings(results, times, task, epochs):
        curve = one.curves[0]
        scores = [score for _, score, _ in curve]
        lines = [[step for step, _, _ in curve], [sent / 1e6 for _, _, sent in curve]]
        lines += [
            [seconds(times, task, one, rate, step) or float("nan") for step, _, _ in curve]
            for rate in rates
        ]
        for panel, line in zip(panels, lines, strict=True):
            panel.plot(line, scores, label=one.way, linewidth=1.2)
    for panel, label in zip(
        panels, ("steps", "MB a rank sent", *(f"seconds at {r}" for r in rates)), strict=True
    ):
        panel.set_xlabel(label)
        panel.set_ylabel(TASKS[task].metric)
        panel.grid(alpha=0.3)
    panels[1].set_xscale("log")
    panels[0].legend(fontsize=6)
    figure.tight_layout()
    path = out.with_name(f"{out.name}-{task}.png")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
