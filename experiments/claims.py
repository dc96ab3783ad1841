"""What an experiment says in the end: a table, one verdict line per claim, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")


@dataclass(frozen=True)
class Claim:
    """One claim and what came of it."""

    claim: str
    expected: str
    measured: str
    holds: bool


@dataclass
class Report:
    """Collects an experiment's results.

    Args:
        name: of the experiment.
        settings: everything that it takes to run it again.
    """

    name: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def row(self, **columns: Any) -> None:
        """Add a line to the table."""
        self.rows.append(columns)

    def claim(self, claim: str, expected: str, measured: str, holds: bool) -> None:
        """Add a verdict."""
        self.claims.append(Claim(claim, expected, measured, bool(holds)))

    def curve(self, label: str, x: Sequence[float], y: Sequence[float]) -> None:
        """Keep a curve for the plot and the JSON file."""
        self.curves[label] = {"x": [float(v) for v in x], "y": [float(v) for v in y]}

    @property
    def all_hold(self) -> bool:
        """Whether every claim holds."""
        return all(claim.holds for claim in self.claims)

    def text(self) -> str:
        """The table and the verdicts, in Markdown that reads well in a terminal."""
        from tabulate import tabulate

        verdicts = [
            [c.claim, c.expected, c.measured, "yes" if c.holds else "NO"] for c in self.claims
        ]
        return "\n\n".join(
            [
                f"## {self.name}",
                ", ".join(f"{key} {value}" for key, value in self.settings.items()),
                *(
                    tabulate(list(rows), headers="keys", tablefmt="github", disable_numparse=True)
                    for _, rows in groupby(self.rows, key=tuple)  # a table for each set of columns
                ),
                tabulate(
                    verdicts, headers=["claim", "expected", "measured", "holds?"], tablefmt="github"
                ),
            ]
        )

    def write(self, out: Path, plot: Callable[[Report, Path], None]) -> None:
        """NAME.md, NAME.json and NAME.png into a folder; what stands above the results stays."""
        out.mkdir(parents=True, exist_ok=True)
        page, text = out / f"{self.name}.md", self.text() + "\n"
        before = page.read_text() if page.is_file() else ""
        start = before.find(f"## {self.name}\n")
        page.write_text(before[: max(start, 0)] + text)
        content = asdict(self)
        (out / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n")
        plot(self, out / f"{self.name}.png")


@dataclass(frozen=True)
class Panel:
    """A part of a plot: the curves whose label starts with a prefix."""

    prefix: str
    xlabel: str
    ylabel: str
    xscale: str = "linear"
    yscale: str = "log"


def plot_curves(
    report: Report, path: Path, *, xlabel: str, ylabel: str, panels: Sequence[str] = ("",)
) -> None:
    """Curves whose label starts with a panel's name, a panel each, y logarithmic."""
    plot_panels(report, path, [[Panel(name, xlabel, ylabel) for name in panels]])


def plot_panels(report: Report, path: Path, grid: Sequence[Sequence[Panel]]) -> None:
    """Rows of panels, equally many in each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = len(grid), len(grid[0])
    figure, axes = plt.subplots(
        rows, columns, figsize=(5 * columns, 3.8 * rows), squeeze=False, layout="constrained"
    )
    for panel, axis in zip((p for row in grid for p in row), axes.flat, strict=True):
        labels = [label for label in report.curves if label.startswith(panel.prefix)]
        for i, label in enumerate(labels):
            curve = report.curves[label]
            name = label.removeprefix(panel.prefix).strip(" :")
            axis.plot(curve["x"], curve["y"], color=COLOURS[i % len(COLOURS)], label=name)
        axis.set(title=panel.prefix.strip(" :"), xlabel=panel.xlabel, ylabel=panel.ylabel)
        axis.set(xscale=panel.xscale, yscale=panel.yscale)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
