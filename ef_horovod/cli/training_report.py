"""`ef-horovod report` of training logs: a table, and a page with plots that compares trainings."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import NamedTuple

from ef_horovod.cli.plotting import COLORS, load_pyplot
from ef_horovod.common.units import show_rate
from ef_horovod.errors import LogError
from ef_horovod.training.advice import break_even
from ef_horovod.training.log_file import Entry, TrainingRun, is_log, read_log

_LAST = 10  # lines at the end over which loss and error are taken
_LAYERS = 15  # in the table of a training
_SMOOTHING = 20  # a curve's mean is over 1/20 of its lines
Runs = dict[str, TrainingRun]


class Plot(NamedTuple):
    """A plot of all trainings."""

    name: str
    xlabel: str
    ylabel: str
    x: Callable[[Entry], float]
    y: Callable[[Entry], float]
    logarithmic: str = ""  # "x" or "y": the axis


def _loss(line: Entry) -> float:
    return line["loss"]


def _error(line: Entry) -> float:
    """Norm of the compression error over that of the gradient."""
    return line["error_norm"] / line["gradient_norm"] if line["gradient_norm"] else math.nan


PLOTS = (
    Plot("loss-steps", "steps", "loss", lambda line: line["step"], _loss),
    Plot(
        "loss-bytes", "MB sent by a rank", "loss",
        lambda line: line["bytes_out"] / 1e6, _loss, logarithmic="x",
    ),
    Plot("loss-time", "seconds", "loss", lambda line: line["seconds"], _loss),
    Plot(
        "error", "steps", "compression error / gradient (norms)",
        lambda line: line["step"], _error, logarithmic="y",
    ),
)  # fmt: skip


def are_training_logs(files: Sequence[Path]) -> bool:
    """Whether any of the files begins as a training log; then all of them have to be one."""
    for file in files:
        try:
            if is_log(file):
                return True
        except OSError:  # told by what reads it
            continue
    return False


def report(
    files: Sequence[Path],
    out: Path | None = None,
    markdown: Path | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Print a table of trainings and notes about their logs, then write the page.

    Args:
        files: logs by `ef.TrainingLog`.
        out: the page; default the first log's name with .html, unless `markdown` is given.
        markdown: folder for report.md and its images.
        say: prints a text.

    Raises:
        LogError: a log is missing or malformed, or the page cannot be written, has another suffix
            or would overwrite a log.
        UnsupportedError: matplotlib is not installed.
    """
    if out is None and markdown is None:
        out = files[0].with_suffix(".html")
    if out is not None:
        _require_page(out, files)
    runs = named(files)
    say(table(runs, "simple"))
    for run in runs.values():
        for note in run.notes:
            say(note)
    images = {plot.name: draw(plot, runs) for plot in PLOTS}
    if out is not None:
        _write(out, html_page(runs, images).encode())
        say(f"The page is {out}")
    if markdown is not None:
        for name, image in images.items():
            _write(markdown / f"{name}.png", image)
        _write(markdown / "report.md", markdown_page(runs).encode())
        say(f"The page is {markdown / 'report.md'}")


def _require_page(out: Path, files: Iterable[Path]) -> None:
    if out.suffix.lower() not in (".html", ".htm") or out.resolve() in {f.resolve() for f in files}:
        raise LogError(
            f"got {out} as page, expected a name that ends in .html and is not that of a log; name "
            "it by -o"
        )


def named(files: Sequence[Path]) -> Runs:
    """The trainings by name: that of the file, or its whole path if two files have the same.

    Raises:
        LogError: a log cannot be read, or is passed twice.
    """
    stems = [file.stem for file in files]
    names = stems if len(set(stems)) == len(stems) else [str(file) for file in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise LogError(f"got {twice} twice, expected each log once; leave one out")
    return {name: read_log(file) for name, file in zip(names, files, strict=True)}


def table(runs: Runs, form: str) -> str:
    """A row of totals for each training, in a format of `tabulate`."""
    from tabulate import tabulate

    rows = [_row(name, run) for name, run in runs.items()]
    align = ["left", *["right"] * (len(rows[0]) - 1)]
    return tabulate(rows, headers="keys", disable_numparse=True, colalign=align, tablefmt=form)


def _row(name: str, run: TrainingRun) -> dict[str, str]:
    last, ranks = run.lines[-1], run.header["ranks"]
    tried = max(last["step"] - run.lines[0]["step"], 1)
    pace = (last["seconds"] - run.lines[0]["seconds"]) / tried
    working = last["seconds_compress"] + last["seconds_decompress"]
    limit = break_even(last["dense_bytes_out"], last["bytes_out"], working)
    sent, dense = last["bytes_out"], last["dense_bytes_out"]
    return {
        "training": name,
        "ranks": f"{ranks}",
        "steps": f"{last['step']:,}",
        "skipped": f"{last['skipped']:,}",
        "loss": _number(_at_end(run, _loss)),
        "MB out": f"{sent / 1e6:,.2f}",
        "MB in": f"{last['bytes_in'] / 1e6:,.2f}",
        "of dense": f"1/{dense / sent:.1f}" if sent else "-",
        "seconds": f"{last['seconds']:,.1f}",
        "ms/step": f"{1000 * pace:.1f}" if pace else "-",
        "compress s": f"{last['seconds_compress']:.2f}",
        "wait s": f"{last['seconds_wait']:.2f}",
        "decompress s": f"{last['seconds_decompress']:.2f}",
        "error/gradient": _number(_at_end(run, _error)),
        "pays below": show_rate(float(f"{limit:.2g}")) if limit else "-",
    }


def _at_end(run: TrainingRun, value: Callable[[Entry], float]) -> float:
    """The median over the last lines."""
    values = [value(line) for line in run.lines[-_LAST:]]
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else math.nan


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def draw(plot: Plot, runs: Runs) -> bytes:
    """A plot as PNG: a faint line per training, and its running mean."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for i, (name, run) in enumerate(runs.items()):
        points = [(plot.x(line), plot.y(line)) for line in run.lines]
        points = [point for point in points if _fits(plot, *point)]
        if not points:
            continue
        color, xs, ys = COLORS[i % len(COLORS)], *map(list, zip(*points, strict=True))
        axes.plot(xs, ys, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(xs, _smooth(ys), color=color, label=name)
    if axes.lines:
        axes.set(**{f"{axis}scale": "log" for axis in plot.logarithmic})
    axes.set(xlabel=plot.xlabel, ylabel=plot.ylabel)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False, fontsize="small")
    else:
        axes.text(0.5, 0.5, "no values in the logs", ha="center", transform=axes.transAxes)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=110)
    pyplot.close(figure)
    return image.getvalue()


def _fits(plot: Plot, x: float, y: float) -> bool:
    """Whether a point can be drawn."""
    positive = {"": True, "x": x > 0, "y": y > 0}
    # Matplotlib computes distances, so that numbers near the largest would overflow.
    return abs(y) < 1e300 and positive[plot.logarithmic]


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean over the last values, up to a part of all."""
    width = max(1, len(values) // _SMOOTHING)
    sums = [0.0, *accumulate(values)]
    starts = [max(0, end - width) for end in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, 1)]


def html_page(runs: Runs, images: dict[str, bytes]) -> str:
    """The whole page, with its images in it."""
    parts = [
        "<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8">',
        "<title>Trainings</title>",
        "<style>body{font-family:sans-serif;margin:2em}table{border-collapse:collapse}"
        "td,th{padding:.2em .6em;border-bottom:1px solid #ccc}</style>",
        "</head><body><h1>Trainings</h1>", table(runs, "html"), f"<p>{escape(_LEGEND)}</p>",
    ]  # fmt: skip
    for plot in PLOTS:
        data = base64.b64encode(images[plot.name]).decode()
        alt = f"{plot.ylabel} against {plot.xlabel}"
        parts.append(f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">')
    for name, run in runs.items():
        parts += [f"<h2>{escape(name)}</h2>", f"<p>{escape(_about(run))}</p>"]
        parts += [layers_table(run, "html")]
        parts += [f"<p>{escape(note)}</p>" for note in run.notes]
    return "\n".join([*parts, "</body></html>", ""])


def markdown_page(runs: Runs) -> str:
    """The same page; its images lie beside it."""
    parts = ["# Trainings", table(runs, "github"), _LEGEND]
    parts += [f"![{plot.ylabel} against {plot.xlabel}]({plot.name}.png)" for plot in PLOTS]
    for name, run in runs.items():
        parts += [f"## {name}", _about(run), layers_table(run, "github"), *run.notes]
    return "\n\n".join(part for part in parts if part) + "\n"


_LEGEND = (
    f"Loss and error/gradient: median of the last {_LAST} lines of the log. Bytes and seconds are "
    "those of the rank that wrote the log. Compression pays only on a network slower than “pays "
    "below”, at which its seconds equal the time of the saved bytes."
)


def _about(run: TrainingRun) -> str:
    header = run.header
    versions = ", ".join(f"{name} {text}" for name, text in header.get("versions", {}).items())
    return (
        f"{header.get('method') or 'one rank'}, {header['ranks']} ranks, exchanges: "
        f"{', '.join(header.get('exchanges', ())) or 'none'}, {header['parameters']:,} parameters. "
        f"{versions}."
    )


def layers_table(run: TrainingRun, form: str) -> str:
    """The parameters with the largest error over gradient at the end; "" if none are logged."""
    from tabulate import tabulate

    layers: dict[str, list[float | None]] = next(
        (line["layers"] for line in reversed(run.lines) if line.get("layers")), {}
    )
    known = [
        (name, error, gradient) for name, (error, gradient) in layers.items() if error and gradient
    ]
    known.sort(key=lambda row: row[1] / row[2], reverse=True)
    rows = [
        {
            "parameter": name,
            "error norm": _number(error),
            "gradient norm": _number(gradient),
            "error/gradient": _number(error / gradient),
        }
        for name, error, gradient in known[:_LAYERS]
    ]
    return tabulate(rows, headers="keys", disable_numparse=True, tablefmt=form) if rows else ""


def _write(file: Path, data: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    except OSError as error:
        raise LogError(
            f"could not write {file} ({error}), expected a place for the page; name another one by "
            "-o or --markdown"
        ) from None
