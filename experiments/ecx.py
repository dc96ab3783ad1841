"""ErrorCompensatedX: the errors of two steps (Tang, Li, Liu, Yan, NeurIPS 2021).

Compression on both ways by 8 workers. The identities; momentum, STORM, IGT and ROOT-SGD on linear
regression, at the specification's settings and at large steps; STORM and IGT on a small network;
a map of where the filtered errors stay bounded. Compared: uncompressed, no compensation, the last
error alone ("EC") and the last two ("ECX"), each with and without the low-pass filter.
"""

from __future__ import annotations

from pathlib import Path

from experiments import ecx_identities, ecx_map, ecx_network, ecx_regression
from experiments.claims import Report, plot_curves
from experiments.workers import Workers


def run(workers: Workers, data: Path, quick: bool) -> Report:
    """All parts; quick: fewer cases, steps and seeds."""
    images = ecx_network.images(data)
    report = Report(
        "ecx",
        {
            "workers": ecx_regression.WORKERS,
            "seeds": 1 if quick else 3,
            "regression": f"d {ecx_regression.D}, F - F* over the last quarter of the steps",
            "network": f"{images.source}, loss on all of them",
        },
    )
    if workers.leads:  # nothing is sent for these
        ecx_identities.check(report)
        ecx_map.chart(report, quick)
    ecx_regression.compare(report, workers, quick)
    if not quick:
        ecx_regression.sweep(report, workers)
    ecx_network.compare(report, workers, images, quick)
    return report


def plot(report: Report, path: Path) -> None:
    """NAME.png: the way down in some cases; NAME-map.png: where the errors stay bounded."""
    wanted = [
        ecx_regression.SPECIFIED[2].name,
        ecx_regression.LARGE[0].name,
        ecx_regression.LARGE[2].name,
        *ecx_network.panels(),
    ]
    panels = [panel for panel in wanted if any(c.startswith(panel) for c in report.curves)]
    plot_curves(report, path, xlabel="step", ylabel="$F - F^*$, or loss", panels=panels)
    ecx_map.plot(report, path.with_name(f"{path.stem}-map.png"))
