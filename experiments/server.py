"""DoubleSqueeze and its baselines through the parameter server: one server and 4 workers as ranks.

The network, the data and the methods are those of `doublesqueeze_network`. The paper takes one
learning rate for all methods; here each of them gets its own best of the same grid, by the training
loss on the first seed, so that no baseline loses by a rate that does not suit it. What all methods
do at the rate that is best without compression, as in the paper, is judged as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from experiments.claims import Panel, Report, plot_panels
from experiments.doublesqueeze_network import BATCH, DROP, FAMILIES, SHAPE, methods
from experiments.networks import (
    Plan,
    Rate,
    Trained,
    Trainer,
    load_images,
    mean_and_spread,
    mean_curve,
)
from experiments.server_job import require_ranks, train_by_server
from experiments.workers import Workers

SEEDS, STEPS, LOOKS = (0, 1, 2), 300, 6
TEST = 5000  # images of the test set that a look takes
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)  # the paper's is 0.1
QUICK_RATE, QUICK_STEPS = 0.2, 100

AS_GOOD = ("DoubleSqueeze, 1 bit", "MEM-SGD, 1 bit", "DoubleSqueeze, top-k", "MEM-SGD, top-k")
WORSE = (  # the first is better than the second
    ("DoubleSqueeze, 1 bit", "ternary, workers only, no memory"),
    ("DoubleSqueeze, 1 bit", "QSGD both ways, no memory"),
    ("DoubleSqueeze, top-k", "Top-k SGD, no memory"),
)
LEAST = {"DoubleSqueeze, 1 bit": 30, "DoubleSqueeze, top-k": 16}  # times fewer bytes, each way

Grid = dict[str, dict[float, Trained]]  # by method and rate, on the first seed
Best = dict[str, list[Trained]]  # by method, one for each seed


def run(workers: Workers, data: Path, quick: bool) -> Report:
    """All methods at all rates on one seed, then at their best one on the others; quick: one rate,
    one seed, few steps, a part of the images."""
    require_ranks(workers)
    images = load_images(workers, data, quick)
    images = replace(images, test=images.test[:TEST], test_labels=images.test_labels[:TEST])
    trainer = Trainer(SHAPE, images, BATCH, looks=2 if quick else LOOKS, workers=Workers())
    rates, seeds, steps = (
        ((QUICK_RATE,), SEEDS[:1], QUICK_STEPS) if quick else (RATES, SEEDS, STEPS)
    )
    grid, best = _train_all(workers, trainer, rates, seeds, steps)
    report = Report("server", _settings(best, rates, seeds, steps))
    _show(report, best)
    _show_grid(report, grid)
    _judge_order(report, best, quick)
    if not quick:
        _judge_grid(report, grid)
    _judge_bytes(report, best)
    return report


def _train_all(
    workers: Workers,
    trainer: Trainer,
    rates: tuple[float, ...],
    seeds: tuple[int, ...],
    steps: int,
) -> tuple[Grid, Best]:
    count = len(methods()) * (len(rates) + len(seeds) - 1)
    bar = tqdm(total=count, disable=None if workers.leads else True)

    def train(name: str, rate: float, seed: int) -> Trained:
        plan = Plan(name, methods()[name], Rate(rate, (DROP,)), steps, seed)
        trained = train_by_server(workers, trainer, plan)
        bar.update()
        return trained

    grid = {name: {rate: train(name, rate, seeds[0]) for rate in rates} for name in methods()}
    best = {}
    for name, row in grid.items():
        first = min(row.values(), key=lambda trained: trained.loss[-1])
        others = [train(name, first.plan.rate.base, seed) for seed in seeds[1:]]
        best[name] = [first, *others]
    bar.close()
    return grid, best


def _settings(
    best: Best, rates: tuple[float, ...], seeds: tuple[int, ...], steps: int
) -> dict[str, object]:
    return {
        "data": f"CIFAR-10 at 16 x 16, {best['SGD'][0].parameters:,} parameters in one vector",
        "test images": f"{TEST:,}",
        "ranks": "1 server, 4 workers",
        "batch": BATCH,
        "steps": f"{steps}, the learning rate divided by 10 at {DROP:.0%}",
        "seeds": seeds,
        "learning rate": f"the best of {rates} for each method, by training loss on seed 0",
    }


def _show(report: Report, best: Best) -> None:
    for name, trained in best.items():
        up, down = _bytes_a_step(trained)
        dense_up, dense_down = _bytes_a_step(best["SGD"])
        report.row(
            method=name,
            rate=f"{trained[0].plan.rate.base:g}",
            **{"training loss": mean_and_spread(trained, "loss")},
            **{"test accuracy": mean_and_spread(trained, "accuracy")},
            **{"bytes up a step": f"{up:,.0f} (1/{dense_up / up:.1f})"},
            **{"bytes down a step": f"{down:,.0f} (1/{dense_down / down:.1f})"},
        )
        steps, loss, accuracy = (mean_curve(trained, w) for w in ("steps", "loss", "accuracy"))
        both = (mean_curve(trained, "up") + mean_curve(trained, "down")) / 1e6
        for family, names in FAMILIES.items():
            if name in names:
                report.curve(f"{family}: {name}", steps, loss)
                report.curve(f"{family}, bytes: {name}", both, loss)
                report.curve(f"{family}, test: {name}", steps, accuracy)
                report.curve(f"{family}, test, bytes: {name}", both, accuracy)


def _show_grid(report: Report, grid: Grid) -> None:
    for name, row in grid.items():
        losses = {f"rate {rate:g}": _shown(trained.loss[-1]) for rate, trained in row.items()}
        report.row(**{"training loss on seed 0": name}, **losses)


def _judge_order(report: Report, best: Best, quick: bool) -> None:
    """The paper's order, of each method at its best rate."""
    percent, points = (15, 5) if quick else (5, 1)
    loss, accuracy = (
        {name: float(mean_curve(trained, what)[-1]) for name, trained in best.items()}
        for what in ("loss", "accuracy")
    )
    for name in AS_GOOD:
        report.claim(
            f"{name} ends where SGD does",
            f"training loss at most {percent} % above SGD's",
            f"{_shown(loss[name])} at SGD's {_shown(loss['SGD'])}",
            loss[name] <= (1 + percent / 100) * loss["SGD"],
        )
        report.claim(
            f"{name} is as accurate as SGD",
            f"test accuracy at most {points} point{'s' * (points > 1)} below SGD's",
            f"{accuracy[name]:.3f} at SGD's {accuracy['SGD']:.3f}",
            accuracy[name] >= accuracy["SGD"] - points / 100,
        )
    for better, worse in WORSE:
        ends = {name: [t.loss[-1] for t in best[name]] for name in (better, worse)}
        report.claim(
            f"{better} is better than {worse}",
            "lower training loss on every seed, with fewer bytes or as many",
            f"{_shown(loss[better])} and {_shown(loss[worse])}",
            max(ends[better]) < min(ends[worse])
            and sum(_bytes_a_step(best[better])) <= sum(_bytes_a_step(best[worse])),
        )


def _judge_grid(report: Report, grid: Grid) -> None:
    """The same order at one rate for all, and whether the grid was wide enough."""
    rate = _best_rate(grid["SGD"])
    for better, worse in WORSE:
        ends = [grid[name][rate].loss[-1] for name in (better, worse)]
        report.claim(
            f"{better} is better than {worse} at SGD's rate too, as in the paper",
            f"lower training loss on seed 0 at {rate:g}",
            " and ".join(map(_shown, ends)),
            ends[0] < ends[1],
        )
    ends = [name for name, row in grid.items() if _best_rate(row) in (min(RATES), max(RATES))]
    report.claim(
        "each method's best rate is inside of the grid",
        "neither the lowest nor the highest",
        ", ".join(f"{name}: {_best_rate(grid[name]):g}" for name in ends) or "all inside",
        not ends,
    )


def _judge_bytes(report: Report, best: Best) -> None:
    dense = _bytes_a_step(best["SGD"])
    for name, least in LEAST.items():
        fewer = [a / b for a, b in zip(dense, _bytes_a_step(best[name]), strict=True)]
        report.claim(
            f"bytes of {name}",
            f"at most 1/{least} of SGD's, up and down",
            f"1/{fewer[0]:.1f} up and 1/{fewer[1]:.1f} down",
            min(fewer) >= least,
        )


def _best_rate(row: dict[float, Trained]) -> float:
    return min(row, key=lambda rate: row[rate].loss[-1])


def _bytes_a_step(trained: list[Trained]) -> tuple[float, float]:
    """Up and down, of one worker with all headers."""
    first = trained[0]
    return first.up[-1] / first.steps[-1], first.down[-1] / first.steps[-1]


def _shown(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else "diverges"


def plot(report: Report, path: Path) -> None:
    """Training loss and test accuracy against steps and bytes, a column for each family."""
    both = "MB up and down, a worker"
    rows: list[Callable[[str], Panel]] = [
        lambda family: Panel(f"{family}:", "step", "training loss", yscale="linear"),
        lambda family: Panel(f"{family}, bytes:", both, "training loss", "log", "linear"),
        lambda family: Panel(f"{family}, test:", "step", "test accuracy", yscale="linear"),
        lambda family: Panel(f"{family}, test, bytes:", both, "test accuracy", "log", "linear"),
    ]
    plot_panels(report, path, [[row(family) for family in FAMILIES] for row in rows])
