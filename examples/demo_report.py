"""What the demo shows in the end: a table, a plot and a log."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

LOG_EVERY = 5  # steps
_SMOOTHED = 20  # steps that a point of a loss curve averages
# Okabe and Ito's colours, which colour-blind people can tell apart, with a line style each.
_STYLES = (
    ("#000000", "-"),
    ("#999999", "--"),
    ("#0072B2", "-"),
    ("#D55E00", "-"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
    ("#E69F00", "--"),
    ("#56B4E9", "-."),
)


class LogEntry(NamedTuple):
    """A logged step of a run."""

    step: int
    loss: float  # mean over ranks
    bytes_sent: int  # per worker, up to and with this step


class Result(NamedTuple):
    """One run: one method, one seed. Bytes are per worker and step."""

    key: str
    label: str
    seed: int
    accuracy: float  # share of the test images
    steps: int
    bytes_sent: float
    bytes_sent_compressed: float  # for the parameters that are compressed, alone
    bytes_kernel: float | None  # by the loopback device's counter
    bytes_control: float | None  # of it at most Horovod's own control traffic
    seconds_per_step: float  # median
    log: list[LogEntry]


def write(results: Sequence[Result], out: Path, description: str) -> str:
    """Write table.md, log.jsonl and plot.png into `out`; returns the table."""
    out.mkdir(parents=True, exist_ok=True)
    text = f"{table(results)}\n\n{notes(results, description)}\n"
    (out / "table.md").write_text(text)
    with (out / "log.jsonl").open("w") as file:
        for result in results:
            for line in _log_lines(result):
                file.write(json.dumps(line) + "\n")
    plot(results, out / "plot.png")
    return text


def table(results: Sequence[Result]) -> str:
    """The table in Markdown: a row for each method, the mean accuracy and medians of its seeds.

    Ratios are to the row of key "dense", where there is one.
    """
    from tabulate import tabulate

    groups = _by_method(results)
    dense = groups.get("dense")
    rows = []
    for runs in groups.values():
        sent, compressed = _median(runs, "bytes_sent"), _median(runs, "bytes_sent_compressed")
        rows.append(
            {
                "method": runs[0].label,
                "test accuracy": f"{100 * mean(run.accuracy for run in runs):.1f} %",
                "bytes sent": f"{sent:,.0f}",
                "to dense": _ratio(dense, "bytes_sent", sent),
                "compressed part": f"{compressed:,.0f}",
                "part to dense": _ratio(dense, "bytes_sent_compressed", compressed),
                "kernel counted": _number(_median(runs, "bytes_kernel")),
                "control at most": _number(_median(runs, "bytes_control")),
                "time per step": f"{1e3 * _median(runs, 'seconds_per_step'):.1f} ms",
            }
        )
    right = ["left", *["right"] * 8]
    return tabulate(rows, headers="keys", tablefmt="pipe", colalign=right, disable_numparse=True)


def notes(results: Sequence[Result], description: str) -> str:
    """What the columns mean."""
    text = (
        f"Measured with {description}. Bytes are per worker and step. `bytes sent` is the "
        "library's count (for Horovod's own rows, of what it hands to its ring allreduce); "
        "`compressed part` is the same without biases and other small parameters, which stay "
        "dense. "
    )
    if results[0].bytes_kernel is None:
        return text + "The kernel's counter is not available here."
    return text + (
        "`kernel counted` is what the loopback device transmitted meanwhile, for all processes and "
        "with TCP headers. In it is Horovod's control traffic, at most what is shown beside it: "
        "that was measured while idle, and a busy Horovod negotiates less often."
    )


def plot(results: Sequence[Result], file: Path) -> None:
    """Loss against steps and against bytes sent, the first seed of each method."""
    import matplotlib  # pip install matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    views: list[tuple[str, Callable[[LogEntry], float], Any]] = [
        ("step", lambda entry: entry.step + 1, "linear"),
        ("bytes sent by each worker", lambda entry: entry.bytes_sent, "log"),
    ]
    for panel, (name, position, scale) in zip(panels, views, strict=True):
        for (color, style), runs in zip(_STYLES, _by_method(results).values(), strict=False):
            log = runs[0].log
            panel.plot(
                [position(entry) for entry in log],
                _smooth([entry.loss for entry in log], _SMOOTHED // LOG_EVERY),
                color=color,
                linestyle=style,
                label=runs[0].label,
            )
        panel.set(xlabel=name, xscale=scale, yscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("training loss")
    panels[0].legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.key, []).append(result)
    return groups


def _median(runs: Sequence[Result], field: str) -> Any:
    values = [getattr(run, field) for run in runs]
    return None if None in values else median(values)


def _ratio(dense: Sequence[Result] | None, field: str, value: float) -> str:
    return f"1/{_median(dense, field) / value:.1f}" if dense and value else "n/a"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:,.0f}"


def _log_lines(result: Result) -> list[dict[str, Any]]:
    run = {"method": result.key, "seed": result.seed}
    summary = {name: value for name, value in result._asdict().items() if name != "log"}
    steps = [{"event": "step", **run, **entry._asdict()} for entry in result.log]
    return [*steps, {"event": "run", "method": summary.pop("key"), **summary}]


def _smooth(values: Sequence[float], width: int) -> list[float]:
    """Means of the last `width` values; fewer at the start."""
    windows = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
