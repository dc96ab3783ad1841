"""Page, plots and verdicts from what `benchmarks/bandwidth.py` measured."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # for experiments/

from bandwidth_claims import (
    DDP_POWER,
    PEERS,
    SLOW,
    TALK,
    TALK_HOSTS,
    Rows,
    add_claims,
    best_of,
    known,
    median_of,
    ring_bytes,
)
from bandwidth_plan import MODELS, WAYS, Case, case_of, epoch_seconds, lines_of, rows_of

from ef_horovod.common.units import read_rate, show_rate
from experiments.claims import Panel, Report, plot_panels

SHOWN = (
    "no exchange",
    "Horovod dense, ring",
    "DDP dense",
    "DDP fp16",
    DDP_POWER,
    "EF21 top-k",
    "DoubleSqueeze 1 bit",
    "PowerSGD rank 4",
)


def make(file: Path) -> Report:
    """Tables, curves and verdicts of a file of results."""
    every = {case_of(row): row for row in rows_of(file)}
    rows = {case: row for case, row in every.items() if case.per_host == 1}
    report = Report("bandwidth", _settings(file, every))
    _step_tables(report, rows)
    _byte_table(report, rows)
    _phase_table(report, rows)
    _winners(report, rows)
    _several_table(report, every)
    _failures(report, every)
    _curves(report, rows)
    add_claims(report, rows)
    return report


def write(report: Report, out: Path) -> None:
    """bandwidth.md and .json, and three plots, into a folder."""
    report.write(out, _plot_peers)
    _plot_talk(report, out / "bandwidth-epochs.png")
    _plot_hosts(report, out / "bandwidth-hosts.png")


def _settings(file: Path, rows: Rows) -> dict[str, Any]:
    runs = [line["settings"] for line in lines_of(file) if "settings" in line]
    last = runs[-1] if runs else {}
    loads = [row["load"] for row in rows.values() if row["ok"]]
    found = {key: last[key] for key in ("cores", "linux", "python") if key in last}
    found |= last.get("versions", {})
    found["batch"] = "32 a worker"
    found["steps timed"] = _span(row["steps"] for row in rows.values() if row["ok"])
    if last.get("quick"):
        found["quick"] = "yes"
    if loads:
        found["load of the machine"] = f"{min(loads):.0f} to {max(loads):.0f}"
    found["data of the CNN"] = next(
        (row["data"] for case, row in rows.items() if case.model == "cnn" and row["ok"]), "none"
    )
    return found


def _span(numbers: Iterable[int]) -> str:
    found = list(numbers)
    return f"{min(found)} to {max(found)}" if found else "none"


# --- tables ------------------------------------------------------------------------------------


def _step_tables(report: Report, rows: Rows) -> None:
    """Milliseconds a step: a table for each model and number of hosts, a column for each rate."""
    for model, hosts in product(MODELS, known(rows, "hosts")):
        own = [case for case in rows if (case.model, case.hosts) == (model, hosts)]
        rates = sorted({case.rate for case in own})
        for way in (name for name in WAYS if any(case.way == name for case in own)):
            cells = {
                show_rate(rate): _cell(rows.get(Case(model, way, hosts, rate))) for rate in rates
            }
            report.row(**{f"{model}, {hosts} hosts: ms a step": way, **cells})


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{1e3 * row['median']:,.0f}" if row["ok"] else "failed"


def _byte_table(report: Report, rows: Rows) -> None:
    """What a worker sends in a step at one rate, by both counts."""
    for case, row in _in_order(rows):
        if case.model == "mlp" and case.rate == SLOW and row["ok"]:
            by_stats, wire, control = (
                row[f"{name}_bytes"] for name in ("stats", "wire", "control")
            )
            report.row(
                **{
                    "mlp: way": case.way,
                    "hosts": case.hosts,
                    "kB a step by stats()": "" if by_stats is None else f"{by_stats / 1e3:,.1f}",
                    "kB by the interface": f"{wire / 1e3:,.1f}",
                    "control, kB": f"{control / 1e3:,.1f}",
                    "resent, kB": f"{row.get('resent_bytes', 0.0) / 1e3:,.1f}",
                    "of a dense ring": f"{wire / ring_bytes(case):.4f}",
                }
            )


def _several_table(report: Report, rows: Rows) -> None:
    """Several ranks on a host: bytes through its interface, and the time of a step."""
    several = {(case.hosts, case.rate) for case in rows if case.per_host > 1}
    for case, row in _in_order(rows):
        if case.model == "mlp" and (case.hosts, case.rate) in several and row["ok"]:
            report.row(
                **{
                    "mlp, several ranks on a host: way": case.way,
                    "hosts": case.hosts,
                    "ranks on each": case.per_host,
                    "rate": show_rate(case.rate),
                    "kB a step by the host's interface": f"{row['wire_bytes'] / 1e3:,.1f}",
                    "ms a step": f"{1e3 * row['median']:,.0f}",
                }
            )


def _phase_table(report: Report, rows: Rows) -> None:
    """Where a step's time goes, at one rate on four hosts."""
    for case, row in _in_order(rows):
        at = (case.model, case.hosts, case.rate) == ("mlp", 4, SLOW)
        if at and row["ok"] and row["stats_bytes"] is not None:
            parts = [row[f"seconds_{name}"] for name in ("compress", "wait", "decompress")]
            # Medians and means: the rest can come out a little below zero.
            rest = max(0.0, row["median"] - sum(parts))
            report.row(
                **{
                    f"mlp, 4 hosts, {show_rate(SLOW)}": case.way,
                    "ms a step": f"{1e3 * row['median']:.0f}",
                    "10 to 90 %": f"{1e3 * row['p10']:.0f} to {1e3 * row['p90']:.0f}",
                    "compress": f"{1e3 * parts[0]:.0f}",
                    "wait": f"{1e3 * parts[1]:.0f}",
                    "decompress": f"{1e3 * parts[2]:.0f}",
                    "the rest": f"{1e3 * rest:.0f}",
                }
            )


def _winners(report: Report, rows: Rows) -> None:
    """The best of others next to the best of ours, wherever both were measured."""
    for model, hosts in product(MODELS, known(rows, "hosts")):
        for rate in known(rows, "rate"):
            others = best_of(rows, PEERS, model, hosts, rate)
            ours = best_of(rows, [w.name for w in WAYS.values() if w.ours], model, hosts, rate)
            if others is None or ours is None:
                continue
            gain = others[1] / ours[1]
            report.row(
                **{
                    "model": model,
                    "hosts": hosts,
                    "rate": show_rate(rate),
                    "best of others": others[0],
                    "ms": f"{1e3 * others[1]:.0f}",
                    "best of ours": ours[0],
                    "ms, ours": f"{1e3 * ours[1]:.0f}",
                    "others / ours": f"{gain:.2f}" + ("" if gain >= 1 else ", we lose"),
                }
            )


def _failures(report: Report, rows: Rows) -> None:
    for case, row in _in_order(rows):
        if not row["ok"]:
            report.row(**{"failed": case.label, "why": row["why"].replace("|", "/")})


def _in_order(rows: Rows) -> list[tuple[Case, dict[str, Any]]]:
    ways = list(WAYS)
    return sorted(
        rows.items(), key=lambda item: (item[0].model, ways.index(item[0].way), *item[0][2:])
    )


# --- plots -------------------------------------------------------------------------------------


def _curves(report: Report, rows: Rows) -> None:
    rates = known(rows, "rate")
    for model in MODELS:
        for way in SHOWN:
            _curve(report, f"{model}, 4 hosts: {way}", rows, model, way, 4, rates, 1e3)
        for title, ways in TALK.items():
            for name, way in ways:
                label = f"{model}, {title}: {name}"
                _curve(report, label, rows, model, way, TALK_HOSTS, rates, None)
    for rate in (SLOW, read_rate("1gbit")):
        for way in SHOWN:
            cases = [Case("mlp", way, hosts, rate) for hosts in known(rows, "hosts")]
            times = [(case.hosts, median_of(rows, case)) for case in cases]
            good = [(hosts, 1e3 * t) for hosts, t in times if t is not None]
            if len(good) > 1:
                report.curve(f"mlp, {show_rate(rate)}: {way}", *zip(*good, strict=True))


def _curve(
    report: Report,
    label: str,
    rows: Rows,
    model: str,
    way: str,
    hosts: int,
    rates: Sequence[int],
    scale: float | None,
) -> None:
    """Seconds times `scale` against 1/bandwidth in s/Gbit; without a scale, those of an epoch."""
    points = []
    for rate in reversed(rates):
        case = Case(model, way, hosts, rate)
        seconds = median_of(rows, case)
        if seconds is not None:
            y = epoch_seconds(case, seconds) if scale is None else scale * seconds
            points.append((1e9 / rate, y))
    if len(points) > 1:
        report.curve(label, *zip(*points, strict=True))


def _panels(report: Report, names: Sequence[str], xlabel: str, ylabel: str, scale: str) -> Any:
    drawn = [n for n in names if any(label.startswith(f"{n}:") for label in report.curves)]
    return [Panel(f"{name}:", xlabel, ylabel, scale, scale) for name in drawn]


def _plot_peers(report: Report, path: Path) -> None:
    names = [f"{model}, 4 hosts" for model in MODELS]
    panels = _panels(report, names, "1 / bandwidth in s/Gbit", "ms a step", "log")
    if panels:
        plot_panels(report, path, [panels])


def _plot_talk(report: Report, path: Path) -> None:
    grid = [
        _panels(
            report,
            [f"{model}, {title}" for title in TALK],
            "1 / bandwidth in s/Gbit",
            "seconds of an epoch",
            "linear",
        )
        for model in MODELS
    ]
    whole = [row for row in grid if len(row) == len(TALK)]
    if whole:
        plot_panels(report, path, whole)


def _plot_hosts(report: Report, path: Path) -> None:
    names = [f"mlp, {show_rate(rate)}" for rate in (SLOW, read_rate("1gbit"))]
    panels = _panels(report, names, "hosts", "ms a step", "log")
    if panels:
        plot_panels(report, path, [panels])
