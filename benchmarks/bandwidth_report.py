"""Page, plots and verdicts from what `benchmarks/bandwidth.py` measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # for experiments/

from bandwidth_plan import MODELS, WAYS, Case, case_of, epoch_seconds, rows_of

from ef_horovod.cluster.network import read_rate, show_rate
from ef_horovod.transports.base import ring_share
from experiments.claims import Panel, Report, plot_panels

Rows = dict[Case, dict[str, Any]]
SLOW = read_rate("100mbit")
DENSE = ("Horovod dense, default", "Horovod dense, ring", "DDP dense")
HALF = ("Horovod fp16, ring", "DDP fp16")
DDP_POWER = "DDP PowerSGD rank 4"
PEERS = (*DENSE, *HALF, DDP_POWER)
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
# The two plots of the talk about DoubleSqueeze, on the server and on Horovod.
TALK = {
    "server, 1 bit": (
        ("uncompressed", "server: uncompressed"),
        ("MEM-SGD", "server: MEM-SGD 1 bit"),
        ("QSGD", "server: QSGD"),
        ("DoubleSqueeze", "server: DoubleSqueeze 1 bit"),
    ),
    "server, top-k": (
        ("uncompressed", "server: uncompressed"),
        ("Top-k SGD", "server: Top-k SGD"),
        ("MEM-SGD", "server: MEM-SGD top-k"),
        ("DoubleSqueeze", "server: DoubleSqueeze top-k"),
    ),
    "Horovod, 1 bit": (
        ("uncompressed", "Horovod dense, ring"),
        ("MEM-SGD", "MEM-SGD 1 bit"),
        ("QSGD", "QSGD"),
        ("DoubleSqueeze", "DoubleSqueeze 1 bit"),
    ),
    "Horovod, top-k": (
        ("uncompressed", "Horovod dense, ring"),
        ("Top-k SGD", "Top-k SGD"),
        ("MEM-SGD", "MEM-SGD top-k"),
        ("DoubleSqueeze", "DoubleSqueeze top-k"),
    ),
}
TALK_HOSTS = 4
TOLERANCE = 0.05  # of bytes, besides control traffic
PACKET_SLACK = 2000  # bytes a step: a few messages' headers and acknowledgements with data


def make(file: Path) -> Report:
    """Tables, curves and verdicts of a file of results."""
    rows = {case_of(row): row for row in rows_of(file)}
    report = Report("bandwidth", _settings(file, rows))
    _step_tables(report, rows)
    _byte_table(report, rows)
    _phase_table(report, rows)
    _winners(report, rows)
    _failures(report, rows)
    _curves(report, rows)
    _claims(report, rows)
    return report


def write(report: Report, out: Path) -> None:
    """bandwidth.md and .json, and three plots, into a folder."""
    report.write(out, _plot_peers)
    _plot_talk(report, out / "bandwidth-epochs.png")
    _plot_hosts(report, out / "bandwidth-hosts.png")


def _settings(file: Path, rows: Rows) -> dict[str, Any]:
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    runs = [line["settings"] for line in lines if "settings" in line]
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
    for model, hosts in product(MODELS, _known(rows, "hosts")):
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
                    "of a dense ring": f"{wire / _ring(case):.4f}",
                }
            )


def _ring(case: Case) -> int:
    return ring_share(4 * MODELS[case.model].parameters, case.hosts)


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
    for model, hosts in product(MODELS, _known(rows, "hosts")):
        for rate in _known(rows, "rate"):
            others = _best(rows, PEERS, model, hosts, rate)
            ours = _best(rows, [w.name for w in WAYS.values() if w.ours], model, hosts, rate)
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


def _known(rows: Rows, field: str) -> list[int]:
    return sorted({getattr(case, field) for case in rows})


def _in_order(rows: Rows) -> list[tuple[Case, dict[str, Any]]]:
    ways = list(WAYS)
    return sorted(
        rows.items(), key=lambda item: (item[0].model, ways.index(item[0].way), *item[0][2:])
    )


def _best(
    rows: Rows, ways: Sequence[str], model: str, hosts: int, rate: int
) -> tuple[str, float] | None:
    found = [(way, _median(rows, Case(model, way, hosts, rate))) for way in ways]
    return min(((w, t) for w, t in found if t is not None), key=lambda x: x[1], default=None)


def _median(rows: Rows, case: Case) -> float | None:
    row = rows.get(case)
    return row["median"] if row and row["ok"] else None


# --- verdicts ----------------------------------------------------------------------------------


def _claims(report: Report, rows: Rows) -> None:
    _speed_claims(report, rows)
    _byte_claims(report, rows)
    for title, ways in TALK.items():
        _slope_claim(report, rows, title, dict(ways))


def _speed_claims(report: Report, rows: Rows) -> None:
    at = f"MLP, 4 hosts, {show_rate(SLOW)}"
    for ours, others, part, words in (
        ("EF21 top-k", DENSE, 0.1, "at most 1/10 of the best dense time"),
        ("EF21 top-k", HALF, 0.2, "at most 1/5 of the best fp16 time"),
        ("EF21 top-k", (DDP_POWER,), 1.0, "no slower than DDP with PowerSGD, rank 4"),
        ("PowerSGD rank 4", (DDP_POWER,), 1.0, "no slower than DDP with PowerSGD, rank 4"),
    ):
        own = _median(rows, Case("mlp", ours, 4, SLOW))
        best = _best(rows, others, "mlp", 4, SLOW)
        if own is None or best is None:
            report.claim(f"{ours}: {words}, {at}", f"{part:g} of it", "not measured", False)
            continue
        measured = f"{1e3 * own:.0f} ms of {1e3 * best[1]:.0f} ({best[0]}): {own / best[1]:.3f}"
        report.claim(f"{ours}: {words}, {at}", f"{part:g} of it", measured, own <= part * best[1])


def _byte_claims(report: Report, rows: Rows) -> None:
    counted = [(c, r) for c, r in rows.items() if r["ok"] and r["stats_bytes"] is not None]
    worst = max((_off(r), c.label) for c, r in counted) if counted else (1.0, "not measured")
    report.claim(
        "bytes by interfaces agree with stats()",
        f"within {TOLERANCE:.0%} and the control traffic of an idle Horovod",
        f"off by {worst[0]:.1%} at most, of {len(counted)}: {worst[1]}",
        worst[0] <= TOLERANCE,
    )
    _growth_claim(
        report,
        rows,
        "DoubleSqueeze 1 bit",
        "bytes of a double pass, 2 to 8 hosts",
        "differ by less than 20 %",
        lambda case, sent: sent,
    )
    _growth_claim(
        report,
        rows,
        "DoubleSqueeze 1 bit",
        "bytes of a double pass, of a dense ring's, 2 to 8 hosts",
        "differ by less than 20 %",
        lambda case, sent: sent / _ring(case),
    )
    _growth_claim(
        report,
        rows,
        "DoubleSqueeze 1 bit, gather",
        "bytes of a gather over n - 1, 2 to 8 hosts",
        "differ by less than 5 %",
        lambda case, sent: sent / (case.hosts - 1),
        most=1.05,
    )


def _off(row: dict[str, Any]) -> float:
    """How far the interface's count is from stats(), beyond the control traffic."""
    beyond = abs(row["wire_bytes"] - row["stats_bytes"])
    return max(0.0, beyond - row["control_bytes"] - PACKET_SLACK) / max(row["stats_bytes"], 1.0)


def _growth_claim(
    report: Report,
    rows: Rows,
    way: str,
    claim: str,
    expected: str,
    share: Callable[[Case, float], float],
    most: float = 1.2,
) -> None:
    cases = [Case("mlp", way, hosts, SLOW) for hosts in (2, 4, 8)]
    if not all(_median(rows, case) for case in cases):
        report.claim(claim, expected, "not measured", False)
        return
    values = [share(case, rows[case]["stats_bytes"]) for case in cases]
    ratio = max(values) / min(values)
    shown = ", ".join(f"{value:,.4g}" for value in values)
    report.claim(claim, expected, f"{shown}: {ratio - 1:.0%}", ratio < most)


def _slope_claim(report: Report, rows: Rows, title: str, ways: dict[str, str]) -> None:
    """DoubleSqueeze's time grows slowest as bandwidth goes down."""
    claim = f"{title}: DoubleSqueeze's time grows slowest with 1/bandwidth"
    expected = "no more than any other's, within 10 %"
    rates = _known(rows, "rate")
    grown = {
        name: _grown(rows, way, rates[0], rates[-1]) if rates else None
        for name, way in ways.items()
    }
    if None in grown.values():
        report.claim(claim, expected, "not measured", False)
        return
    shown = ", ".join(f"{name} {1e3 * value:,.0f}" for name, value in grown.items())
    own = grown.pop("DoubleSqueeze")
    span = f"ms from {show_rate(rates[-1])} to {show_rate(rates[0])}"
    report.claim(claim, expected, f"{span}: {shown}", own <= 1.1 * min(grown.values()))


def _grown(rows: Rows, way: str, slow: int, fast: int) -> float | None:
    times = [_median(rows, Case("mlp", way, TALK_HOSTS, rate)) for rate in (slow, fast)]
    return None if None in times else times[0] - times[1]


# --- plots -------------------------------------------------------------------------------------


def _curves(report: Report, rows: Rows) -> None:
    rates = _known(rows, "rate")
    for model in MODELS:
        for way in SHOWN:
            _curve(report, f"{model}, 4 hosts: {way}", rows, model, way, 4, rates, 1e3)
        for title, ways in TALK.items():
            for name, way in ways:
                label = f"{model}, {title}: {name}"
                _curve(report, label, rows, model, way, TALK_HOSTS, rates, None)
    for rate in (SLOW, read_rate("1gbit")):
        for way in SHOWN:
            cases = [Case("mlp", way, hosts, rate) for hosts in _known(rows, "hosts")]
            times = [(case.hosts, _median(rows, case)) for case in cases]
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
        seconds = _median(rows, case)
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
