"""DoubleSqueeze and its baselines on a small network: CIFAR-10, as in the paper's experiment.

The paper trains ResNet-18 on 8 workers for hundreds of epochs; here it is a network of 106,202
parameters on images of 16 x 16 and 4 workers for 1.5 epochs. As in the paper there is no momentum,
the learning rate is the same for all, chosen without compression, and is divided by ten once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import ef_horovod as ef
from experiments.claims import Panel, Report, plot_panels
from experiments.networks import (
    Convolutional,
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

SHAPE, BATCH, SEEDS = Convolutional(64), 32, (0, 1)
RATES, DROP = (0.1, 0.2, 0.4, 0.8), 2 / 3
RATIO = 1 / 32  # of top-k, about the paper's

FAMILIES = {
    "1 bit": (
        "SGD",
        "DoubleSqueeze, 1 bit",
        "MEM-SGD, 1 bit",
        "ternary, workers only, no memory",
        "QSGD both ways, no memory",
    ),
    "top-k": ("SGD", "DoubleSqueeze, top-k", "MEM-SGD, top-k", "Top-k SGD, no memory"),
}


def methods() -> dict[str, ef.Method]:
    """The paper's QSGD is ternary, with probabilities as in `TernGrad`, and answers uncompressed;
    QSGD both ways has 2 bits an entry and a norm for every 512."""
    sign, top, qsgd = ef.OneBit("l2"), ef.TopK(ratio=RATIO), ef.QSGD(levels=1, bucket=512)
    return {
        "SGD": ef.NoFeedback(ef.Identity()),
        "DoubleSqueeze, 1 bit": ef.DoubleSqueeze(sign, server_compressor=sign),
        "MEM-SGD, 1 bit": ef.DoubleSqueeze(sign, server_compressor=ef.Identity()),
        "ternary, workers only, no memory": ef.NoFeedback(ef.TernGrad()),
        "QSGD both ways, no memory": ef.NoFeedback(qsgd, server_compressor=qsgd),
        "DoubleSqueeze, top-k": ef.DoubleSqueeze(top, server_compressor=top),
        "MEM-SGD, top-k": ef.DoubleSqueeze(top, server_compressor=ef.Identity()),
        "Top-k SGD, no memory": ef.NoFeedback(top, server_compressor=top),
    }


def prepare(workers: Workers, data: Path, quick: bool) -> Trainer | None:
    """Reads the images; see `make_trainer`."""
    return make_trainer(workers, data, quick, shape=SHAPE, batch=BATCH)


def add_network(report: Report, trainer: Trainer, quick: bool) -> None:
    """All methods on all seeds; quick: one seed, few steps, a part of the images."""
    steps, seeds = (100, SEEDS[:1]) if quick else (600, SEEDS)
    rates = RATES[1:2] if quick else RATES
    sgd = best_of(trainer, [_plan("SGD", seeds[0], rate, steps) for rate in rates])
    rate = sgd.plan.rate.base
    plans = [
        _plan(name, seed, rate, steps)
        for name in methods()
        for seed in seeds
        if (name, seed) != ("SGD", seeds[0])
    ]
    done: dict[str, list[Trained]] = {name: [] for name in methods()}
    for trained in [sgd, *trainer.each(train, plans)]:
        done[trained.plan.label].append(trained)
    report.settings["network"] = (
        f"CIFAR-10 at 16 x 16, {sgd.parameters:,} parameters, 4 workers, batch "
        f"{BATCH}, {steps} steps, seeds {seeds}, learning rate {rate:g} of {rates}"
    )
    if trainer.workers.leads:
        _show(report, done)
        _judge(report, done, quick)


def _show(report: Report, done: dict[str, list[Trained]]) -> None:
    for name, trained in done.items():
        both, loss = (
            mean_curve(trained, "up") + mean_curve(trained, "down"),
            mean_curve(trained, "loss"),
        )
        diverged = not np.isfinite(loss[-1])
        whole, steps = _traffic(done["SGD"]), trained[0].steps
        report.row(
            network=name,
            **{"training loss": mean_and_spread(trained, "loss")},
            **{"test accuracy": mean_and_spread(trained, "accuracy")},
            **{"bytes up a step": f"{trained[0].up[-1] / steps[-1]:,.0f}"},
            **{"bytes down a step": f"{trained[0].down[-1] / steps[-1]:,.0f}"},
            **{"times fewer both ways": f"{whole / _traffic(trained):.1f}"},
            **{"sent to all others": "" if diverged else f"{trained[0].sent[-1]:,.0f}"},
        )
        label = f"{name} (diverges)" if diverged else name
        for family, names in FAMILIES.items():
            if name in names:
                report.curve(f"{family}: {label}", steps, loss)
                report.curve(f"{family}, bytes: {label}", both / 1e6, loss)


def _judge(report: Report, done: dict[str, list[Trained]], quick: bool) -> None:
    sgd, percent = _end(done["SGD"]), 15 if quick else 5
    for name in (
        "DoubleSqueeze, 1 bit",
        "MEM-SGD, 1 bit",
        "DoubleSqueeze, top-k",
        "MEM-SGD, top-k",
    ):
        report.claim(
            f"network: {name} ends where SGD does",
            f"training loss at most {percent} % above SGD's",
            f"{_end(done[name]):.3f} at SGD's {sgd:.3f}",
            _end(done[name]) <= (1 + percent / 100) * sgd,
        )
    for better, worse in (
        ("DoubleSqueeze, 1 bit", "ternary, workers only, no memory"),
        ("DoubleSqueeze, 1 bit", "QSGD both ways, no memory"),
        ("DoubleSqueeze, top-k", "Top-k SGD, no memory"),
    ):
        report.claim(
            f"network: {better} ends below {worse}",
            "lower training loss on every seed, with fewer bytes or as many",
            f"{_end(done[better]):.3f} and {_end(done[worse]):.3f}",
            max(t.loss[-1] for t in done[better]) < min(t.loss[-1] for t in done[worse])
            and _traffic(done[better]) <= _traffic(done[worse]),
        )
    for name, least, most in (
        ("DoubleSqueeze, 1 bit", 31, 32),
        ("DoubleSqueeze, top-k", 16, 32),  # indices of 32 bits would make it 16
        ("MEM-SGD, 1 bit", 1, 2),
        ("MEM-SGD, top-k", 1, 2),
    ):
        fewer = _traffic(done["SGD"]) / _traffic(done[name])
        report.claim(
            f"network: bytes both ways of {name}",
            f"{least} to {most} times fewer than SGD's",
            f"{fewer:.1f} times fewer",
            least <= fewer <= most,
        )


def _end(trained: Sequence[Trained]) -> float:
    return float(mean_curve(trained, "loss")[-1])


def _traffic(trained: Sequence[Trained]) -> float:
    return trained[0].up[-1] + trained[0].down[-1]


def plot_network(report: Report, path: Path) -> None:
    """Training loss against steps and against bytes both ways, a column for each family."""
    loss, both = "training loss", "MB up and down, a worker"
    plot_panels(
        report,
        path,
        [
            [Panel(f"{family}:", "step", loss, yscale="linear") for family in FAMILIES],
            [Panel(f"{family}, bytes:", both, loss, "log", "linear") for family in FAMILIES],
        ],
    )


def _plan(name: str, seed: int, rate: float, steps: int) -> Plan:
    return Plan(name, methods()[name], Rate(rate, (DROP,)), steps, seed)
