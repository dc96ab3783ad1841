"""Hard threshold against top-k at equal volume on a network: CIFAR-10, as in the paper.

The paper trains ResNet-18 and others, of 6 to 11 million parameters, for 300 epochs; here it is a
network of two hidden layers, 661,514 parameters, for 1.5 epochs, so that 0.01 % are 66 entries. As
in the paper's code gradients are compressed with error feedback, and momentum comes after the
average; the schedule is the paper's, in proportion. Weight decay is left out.

Calibration: the threshold starts from the paper's rule of thumb, a pilot of a sixth of the steps
corrects it, and bisection over whole trainings of one seed ends within 3 % of top-k's volume, or
as near as it gets. All seeds then use that threshold.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import ef_horovod as ef
from ef_horovod import theory
from experiments.claims import Panel, Report, plot_panels
from experiments.networks import (
    Dense,
    Plan,
    Rate,
    Trained,
    Trainer,
    best_of,
    make_trainer,
    mean_and_spread,
    mean_curve,
    train,
)
from experiments.workers import Workers

SHAPE, BATCH, SEEDS = Dense((512, 512)), 32, (0, 1)
DENSITIES = (1e-3, 1e-4)
RATES, DROPS, WARM_UP = (0.01, 0.02, 0.04), (1 / 2, 5 / 6), 5 / 300
PILOT, MOST_RUNS = 1 / 6, 10  # part of the steps; of each search


class MomentumServer(NamedTuple):
    """The aggregator's state."""

    mean: np.ndarray  # float32[d]
    momentum: np.ndarray  # float32[d]


@dataclass(frozen=True)
class Momentum(ef.ErrorFeedback):
    """Error feedback on gradients, then m = mu m + g of their mean g, and direction = g + m.

    References:
        The authors' `cnn-lstm/train.py`; the buffer comes in with factor 1, not mu.
    """

    mu: float = 0.9

    def init(self, x: Any, workers: int = 1) -> tuple[Any, MomentumServer]:
        worker, server = super().init(x, workers)
        return worker, MomentumServer(server.mean, np.zeros_like(server.mean))

    def reduce(self, server: Any, messages: Any, key: Any) -> tuple[Any, Any]:
        mean, _ = super().reduce(server, messages, key)
        server.momentum[:] *= self.mu
        server.momentum[:] += mean
        mean += server.momentum
        return mean, server


@dataclass(frozen=True)
class Budget:
    """What one calibration is for: so many parts of all entries in each step on average."""

    density: float
    entries: int
    rate: Rate
    steps: int


@dataclass(frozen=True)
class Found:
    """What came of it."""

    budget: Budget
    rule: float  # the threshold by the rule of thumb
    pilot: theory.Calibration
    whole: theory.Calibration
    trained: Trained  # at the threshold that was found


def calibrate(trainer: Trainer, budget: Budget) -> Found:
    """Find the threshold that sends as many entries as top-k over a whole training."""
    k, short = budget.entries, int(PILOT * budget.steps)
    rule = theory.threshold_from_budget(k)
    pilot, _ = _search(trainer, budget, short, start=rule, tolerance=0.1)
    near = (pilot.threshold / 4, pilot.threshold * 4)
    whole, trained = _search(
        trainer, budget, budget.steps, start=pilot.threshold, limits=near, tolerance=0.03
    )
    return Found(budget, rule, pilot, whole, trained)


def _search(
    trainer: Trainer, budget: Budget, steps: int, **options: Any
) -> tuple[theory.Calibration, Trained]:
    """The threshold whose training comes closest to the budget, and that training.

    Trainings are chaotic, so the volume jumps by some percent even between thresholds that are
    almost equal: after MOST_RUNS the closest one has to do.
    """
    runs: dict[float, Trained] = {}

    def average(threshold: float) -> float:
        hard = ef.HardThreshold(threshold)
        plan = _plan("HardThreshold", budget.density, hard, budget.rate, steps, SEEDS[0])
        runs[threshold] = trainer.train(replace(plan, shown=steps == budget.steps))
        return runs[threshold].entries_a_step

    with contextlib.suppress(ValueError):  # too many runs
        theory.calibrate(average, budget.entries, max_runs=MOST_RUNS, **options)
    closest = min(runs, key=lambda t: abs(runs[t].entries_a_step - budget.entries))
    trained = runs[closest]
    return theory.Calibration(closest, trained.entries_a_step, len(runs)), trained


def prepare(workers: Workers, data: Path, quick: bool) -> Trainer | None:
    """Reads the images; see `make_trainer`."""
    return make_trainer(workers, data, quick, shape=SHAPE, batch=BATCH)


def add_network(report: Report, trainer: Trainer, quick: bool) -> None:
    """Both densities on all seeds; quick: one of each, few steps, a part of the images."""
    steps, seeds = (48, SEEDS[:1]) if quick else (600, SEEDS)
    densities, rates = (DENSITIES[:1], RATES[1:2]) if quick else (DENSITIES, RATES)
    dense = best_of(trainer, [_dense(rate, seeds[0], steps) for rate in rates])
    rate = dense.plan.rate
    found = trainer.each(
        calibrate, [Budget(p, int(p * dense.parameters), rate, steps) for p in densities]
    )
    plans = [_dense(rate.base, seed, steps) for seed in seeds[1:]]
    for one in found:
        density, threshold = one.budget.density, one.whole.threshold
        for seed in seeds:
            plans.append(_plan("TopK", density, ef.TopK(ratio=density), rate, steps, seed))
        for seed in seeds[1:]:
            hard = ef.HardThreshold(threshold)
            plans.append(_plan("HardThreshold", density, hard, rate, steps, seed))
    done: dict[str, list[Trained]] = {}
    for trained in [dense, *(one.trained for one in found), *trainer.each(train, plans)]:
        done.setdefault(trained.plan.label, []).append(trained)
    report.settings["network"] = (
        f"CIFAR-10 at 16 x 16, {dense.parameters:,} parameters, 4 workers, batch {BATCH}, "
        f"{steps} steps, seeds {seeds}, momentum 0.9, learning rate {rate.base:g} of {rates}"
    )
    if trainer.workers.leads:
        _show(report, done)
        for one in found:
            _judge(report, one, done, quick)


def _dense(rate: float, seed: int, steps: int) -> Plan:
    return Plan("uncompressed", Momentum(ef.Identity()), Rate(rate, DROPS, WARM_UP), steps, seed)


def _plan(
    name: str, density: float, compressor: ef.Compressor, rate: Rate, steps: int, seed: int
) -> Plan:
    return Plan(_label(name, density), Momentum(compressor), rate, steps, seed)


def _label(name: str, density: float) -> str:
    return f"{name}, {density:.2%}"


def _show(report: Report, done: dict[str, list[Trained]]) -> None:
    for name, trained in done.items():
        entries = np.mean([one.entries_a_step for one in trained])
        report.row(
            network=name,
            **{"test accuracy": mean_and_spread(trained, "accuracy")},
            **{"training loss": mean_and_spread(trained, "loss")},
            **{"entries a step": f"{entries:.1f}" if entries else "all"},
            **{"sent to all others": f"{mean_curve(trained, 'sent')[-1]:,.0f}"},
            **{"total error": f"{np.mean([one.error for one in trained]):.3g}"},
        )
        for density in DENSITIES:
            if name.endswith(f" {density:.2%}"):
                accuracy, sent = mean_curve(trained, "accuracy"), mean_curve(trained, "sent")
                report.curve(f"{density:.2%}: {name.split(',')[0]}", sent / 1e6, accuracy)


def _judge(report: Report, found: Found, done: dict[str, list[Trained]], quick: bool) -> None:
    density = found.budget.density
    what = f"network, {density:.2%}"
    hard, top = (done[_label(name, density)] for name in ("HardThreshold", "TopK"))
    volume = ", ".join(f"{one.entries_a_step:.1f}" for one in hard)
    target = top[0].entries_a_step
    report.claim(
        f"{what}: calibration meets the budget on all seeds",
        "within 5 %",
        f"{volume} for {target:g} at threshold {found.whole.threshold:.3g} "
        f"(rule of thumb {found.rule:.3g}, pilot {found.pilot.threshold:.3g}; "
        f"{found.pilot.runs} short and {found.whole.runs} whole runs)",
        all(abs(one.entries_a_step / target - 1) <= 0.05 for one in hard),
    )
    if quick:  # too few steps for more
        return
    ratio = float(np.mean([t.error for t in top]) / np.mean([h.error for h in hard]))
    report.claim(
        f"{what}: total error at equal volume",
        "smaller than top-k's",
        f"{ratio:.2f} times smaller",
        ratio > 1,
    )
    accuracy = [float(mean_curve(ts, "accuracy")[-1]) for ts in (hard, top)]
    report.claim(
        f"{what}: test accuracy at equal volume",
        "at least top-k's",
        f"{accuracy[0]:.3f} and {accuracy[1]:.3f}",
        accuracy[0] >= accuracy[1],
    )


def plot_network(report: Report, path: Path) -> None:
    """Test accuracy against bytes, a panel for each density."""
    xlabel, ylabel = "MB that a worker sends to all others", "test accuracy"
    shown = [f"{density:.2%}:" for density in DENSITIES]
    shown = [name for name in shown if any(label.startswith(name) for label in report.curves)]
    plot_panels(report, path, [[Panel(name, xlabel, ylabel, yscale="linear") for name in shown]])
