"""Verdicts on what `benchmarks/bandwidth.py` measured, and how its rows are asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # for experiments/

from bandwidth_plan import MODELS, Case

from ef_horovod.common.units import read_rate, show_rate
from ef_horovod.transports.base import ring_share
from experiments.claims import Report

Rows = dict[Case, dict[str, Any]]
SLOW = read_rate("100mbit")
DENSE = ("Horovod dense, default", "Horovod dense, ring", "DDP dense")
HALF = ("Horovod fp16, ring", "DDP fp16")
DDP_POWER = "DDP PowerSGD rank 4"
AUTO, SAME_SUMS = "EF21 top-k, auto", "Horovod dense, ring"
AUTO_SLOWER = 1.05
PEERS = (*DENSE, *HALF, DDP_POWER)
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
NOISE = 0.02  # of times; methods with equal bytes grow alike
PACKET_SLACK = 2000  # bytes a step: MPI headers and requests, which an idle Horovod does not send


def add_claims(report: Report, rows: Rows) -> None:
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
        own = median_of(rows, Case("mlp", ours, 4, SLOW))
        best = best_of(rows, others, "mlp", 4, SLOW)
        if own is None or best is None:
            report.claim(f"{ours}: {words}, {at}", f"{part:g} of it", "not measured", False)
            continue
        measured = f"{1e3 * own:.0f} ms of {1e3 * best[1]:.0f} ({best[0]}): {own / best[1]:.3f}"
        report.claim(f"{ours}: {words}, {at}", f"{part:g} of it", measured, own <= part * best[1])
    _auto_claim(report, rows)


def _auto_claim(report: Report, rows: Rows) -> None:
    """On the fastest links, where compressing does not pay, `auto` is as fast as dense sums."""
    fastest = max(known(rows, "rate"))
    ratios = []
    for case in (case for case in rows if case.way == AUTO and case.rate == fastest):
        own, dense = median_of(rows, case), median_of(rows, case._replace(way=SAME_SUMS))
        if own is not None and dense is not None:
            ratios.append((own / dense, f"{case.model}, {case.hosts} hosts"))
    report.claim(
        f"{AUTO}: as fast as {SAME_SUMS} at {show_rate(fastest)}",
        f"at most {AUTO_SLOWER:g} of its time",
        ", ".join(f"{ratio:.2f} ({where})" for ratio, where in sorted(ratios)) or "not measured",
        bool(ratios) and max(ratios)[0] <= AUTO_SLOWER,
    )


def _byte_claims(report: Report, rows: Rows) -> None:
    counted = [(c, r) for c, r in rows.items() if r["ok"] and r["stats_bytes"] is not None]
    off = sorted(((_off(row), case.label) for case, row in counted), reverse=True)
    worst, where = off[0] if off else (1.0, "not measured")
    beyond = sum(share > TOLERANCE for share, _ in off)
    report.claim(
        "bytes by interfaces agree with stats()",
        f"within {TOLERANCE:.0%} and 2 kB, besides control traffic and what TCP resent",
        f"{beyond} of {len(off)} are not; off by {worst:.1%} at most: {where}",
        worst <= TOLERANCE,
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
        lambda case, sent: sent / ring_bytes(case),
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
    """How far the interface's count is from stats(), beyond control traffic and packets resent."""
    beyond = row["wire_bytes"] - row["stats_bytes"]
    if beyond > 0:
        beyond = max(0.0, beyond - row["control_bytes"] - row.get("resent_bytes", 0.0))
    return max(0.0, abs(beyond) - PACKET_SLACK) / max(row["stats_bytes"], 1.0)


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
    if not all(median_of(rows, case) for case in cases):
        report.claim(claim, expected, "not measured", False)
        return
    values = [share(case, rows[case]["stats_bytes"]) for case in cases]
    ratio = max(values) / min(values)
    shown = ", ".join(f"{value:,.4g}" for value in values)
    report.claim(claim, expected, f"{shown}: {ratio - 1:.0%}", ratio < most)


def _slope_claim(report: Report, rows: Rows, title: str, ways: dict[str, str]) -> None:
    """DoubleSqueeze's time grows slowest as bandwidth goes down."""
    claim = f"{title}: DoubleSqueeze's time grows slowest with 1/bandwidth"
    expected = f"no other's by less, up to {NOISE:.0%} of uncompressed's"
    times = {
        rate: {
            name: median_of(rows, Case("mlp", way, TALK_HOSTS, rate)) for name, way in ways.items()
        }
        for rate in known(rows, "rate")
    }
    rates = [rate for rate, found in times.items() if None not in found.values()]
    if len(rates) < 2:
        report.claim(claim, expected, "not measured", False)
        return
    slow, fast = times[rates[0]], times[rates[-1]]
    grown = {name: slow[name] - fast[name] for name in ways}
    shown = ", ".join(f"{name} {1e3 * value:,.0f}" for name, value in grown.items())
    own, noise = grown.pop("DoubleSqueeze"), NOISE * grown["uncompressed"]
    span = f"ms from {show_rate(rates[-1])} to {show_rate(rates[0])}"
    report.claim(claim, expected, f"{span}: {shown}", own <= min(grown.values()) + noise)


# --- asking rows


def known(rows: Rows, field: str) -> list[int]:
    return sorted({getattr(case, field) for case in rows})


def best_of(
    rows: Rows, ways: Sequence[str], model: str, hosts: int, rate: int
) -> tuple[str, float] | None:
    found = [(way, median_of(rows, Case(model, way, hosts, rate))) for way in ways]
    return min(((w, t) for w, t in found if t is not None), key=lambda x: x[1], default=None)


def median_of(rows: Rows, case: Case) -> float | None:
    row = rows.get(case)
    return row["median"] if row and row["ok"] else None


def ring_bytes(case: Case) -> int:
    return ring_share(4 * MODELS[case.model].parameters, case.hosts)
