"""Where the errors of ErrorCompensatedX stay bounded: a map over alpha, beta and the compressor.

One worker, A = a fixed mean + N(0, I) in 1000 dimensions, which does not react to what is sent: the
errors' own dynamics. What a loop of optimisation makes of them is in the regression's sweep.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import ef_horovod as ef
from experiments.claims import COLOURS, Report
from experiments.ecx_regression import short

D, CAP, DEFAULT = 1000, 1e3, 0.3
ALPHAS = (0.02, 0.05, 0.1, 0.2, 0.5, 0.9)
BETAS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05)
COMPRESSORS = (
    ef.TopK(ratio=0.01), ef.TopK(ratio=0.1), ef.TopK(ratio=0.3), ef.TopK(ratio=0.5), ef.OneBit(),
)  # fmt: skip


def chart(report: Report, quick: bool) -> None:
    """Curves `map COMPRESSOR: BETA` over alpha, and a verdict on the default beta."""
    steps = 50 if quick else 400
    sizes = np.array(
        [[[_size(c, a, b, steps) for a in ALPHAS] for b in BETAS] for c in COMPRESSORS]
    )
    for compressor, of_compressor in zip(COMPRESSORS, sizes, strict=True):
        for beta, line in zip(BETAS, of_compressor, strict=True):
            report.curve(f"map {short(compressor)}: {beta:g}", ALPHAS, line)
    cells, default = len(ALPHAS) * len(COMPRESSORS), BETAS.index(DEFAULT)
    bounded = np.sum(sizes < CAP / 10, axis=(0, 2))
    counts = ", ".join(f"{b:g}: {n}" for b, n in zip(BETAS, bounded, strict=True))
    report.claim(
        f"map: of {cells} pairs of alpha and compressor, the errors stay bounded",
        "in all with the default beta 0.3, not with 1", f"beta {counts}",
        bounded[default] == cells > bounded[0],
    )  # fmt: skip


def _size(compressor: ef.Compressor, alpha: float, beta: float, steps: int) -> float:
    """||delta|| / ||A||, the mean over the last tenth; at most CAP."""
    method = ef.ErrorCompensatedX(compressor, alpha=alpha, beta=beta)
    rng = np.random.default_rng(0)
    mean = rng.normal(size=D).astype(np.float32)
    state, _ = method.init(np.zeros(D, np.float32))
    sizes = []
    for step in range(steps):
        a = mean + rng.standard_normal(D, np.float32)
        norm = float(np.linalg.norm(a))
        try:
            _, state = method.push(state, a, ef.Key(0, step))
        except ef.NonFiniteError:
            return CAP
        size = float(np.linalg.norm(state.last)) / norm
        if not size < CAP:
            return CAP
        sizes.append(size)
    return float(np.mean(sizes[-steps // 10 :]))


def plot(report: Report, path: Path) -> None:
    """Heat maps of the errors' sizes; below them the regression against the step size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sweeps = sorted({label.split(": ")[0] for label in report.curves if label.startswith("sweep")})
    figure = plt.figure(figsize=(15, 7 if sweeps else 3.5), layout="constrained")
    top, *bottom = figure.subfigures(2 if sweeps else 1, 1, squeeze=False)[:, 0]
    heat = top.subplots(1, len(COMPRESSORS), sharey=True)
    for compressor, axis in zip(COMPRESSORS, heat, strict=True):
        image = _heat(report, axis, short(compressor))
    top.colorbar(image, ax=list(heat), label=r"$\|\delta\| / \|A\|$; white: diverges")
    axes = bottom[0].subplots(1, len(sweeps)) if sweeps else []  # --quick has no sweep
    for title, axis in zip(sweeps, axes, strict=True):
        labels = [label for label in report.curves if label.startswith(f"{title}: ")]
        for i, label in enumerate(labels):
            curve = report.curves[label]
            name, colour = label.split(": ")[1], COLOURS[i % len(COLOURS)]
            axis.loglog(curve["x"], curve["y"], "o-", color=colour, label=name)
        axis.set(title=title.removeprefix("sweep "), xlabel="step size", ylabel="$F - F^*$, end")
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _heat(report: Report, axis, name: str):  # type: ignore[no-untyped-def]
    """One compressor's panel; white where the errors diverge."""
    from matplotlib.colors import LogNorm

    lines = np.array([report.curves[f"map {name}: {beta:g}"]["y"] for beta in BETAS])
    shown = np.ma.masked_where(lines >= CAP, lines)
    image = axis.imshow(shown, norm=LogNorm(0.1, 100), cmap="viridis", aspect="auto")
    for row, line in enumerate(lines):
        for column, size in enumerate(line):
            text = f"{size:.1f}" if size < 10 else f"{size:.0f}" if size < CAP else "∞"
            dark = size >= CAP or size > 5
            axis.text(column, row, text, ha="center", va="center", fontsize=7,
                      color="black" if dark else "white")  # fmt: skip
    axis.set(title=name, xlabel=r"$\alpha$", ylabel=r"$\beta$")
    axis.set_xticks(range(len(ALPHAS)), [f"{a:g}" for a in ALPHAS])
    axis.set_yticks(range(len(BETAS)), [f"{b:g}" for b in BETAS])
    return image
