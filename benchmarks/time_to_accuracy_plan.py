"""What `benchmarks/time_to_accuracy.py` trains: tasks, ways to exchange, and the order of runs.

Nothing here loads a framework.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RANKS = 4


class Way(NamedTuple):
    """A way to train on several ranks.

    Args:
        name: for options and tables.
        carrier: "horovod" or "ddp" for dense training by these; "ours".
        method: of this package, as `read_method` reads it.
        what: is compressed: "gradient", "momentum" (the method makes the update; the optimizer is
            plain SGD) or "update" (of the inner optimizer).
        inner: optimizer: "sgd", "adamw" or "muon".
        dense_part: part of the steps that come first and are dense.
        fp16: gradients travel as float16.
        power_rank: of PyTorch's PowerSGD hook; 0: none.
        exchange: of this package.
        vectors: compress biases and scales, too.
        local_steps: of "update", per exchange.
    """

    name: str
    carrier: str
    method: str = ""
    what: str = "gradient"
    inner: str = "sgd"
    dense_part: float = 0.0
    fp16: bool = False
    power_rank: int = 0
    exchange: str = "auto"
    vectors: bool = False
    local_steps: int = 1


class Task(NamedTuple):
    """A training: its length, and the rates that each way chooses from.

    Args:
        epochs: of a run; a run that chooses a rate has a quarter of them.
        metric: what the score is.
        higher: whether a higher score is better.
        rates: of learning, by inner optimizer.
        ways: by name, the most telling first.
        seeds: of runs at the best rate.
    """

    epochs: int
    metric: str
    higher: bool
    rates: dict[str, tuple[float, ...]]
    ways: dict[str, Way]
    seeds: tuple[int, ...] = (0, 1, 2)


def _by_name(*ways: Way) -> dict[str, Way]:
    return {way.name: way for way in ways}


def _momentum(compressor: str) -> str:
    return f"MomentumCorrection({compressor}, nesterov=True)"


def _signs(ratio: float) -> str:
    return f"Then(TopK({ratio}), OneBit())"


def _natural(ratio: float) -> str:
    return f"Then(TopK({ratio}), Natural())"


_DOUBLE = "DoubleSqueeze(OneBit(), server_compressor=OneBit())"

_FEW_SIGNS = f"ErrorFeedback({_signs(0.02)})"
_FEWER_SIGNS = f"ErrorFeedback({_signs(0.003)})"
_IMAGE_WAYS = _by_name(
    Way("Horovod dense", "horovod"),
    Way("momentum, signs of 1 %", "ours", _momentum(_signs(0.01)), "momentum"),
    Way("momentum, top-k 0.5 %, natural", "ours", _momentum(_natural(0.005)), "momentum"),
    Way("SGD's updates, signs of 1 %", "ours", f"ErrorFeedback({_signs(0.01)})", "update"),
    Way("SGD's updates, signs of 2 % of all", "ours", _FEW_SIGNS, "update", vectors=True),
    Way("SGD's updates, signs of 0.3 % of all", "ours", _FEWER_SIGNS, "update", vectors=True),
    Way("PowerSGD rank 1", "ours", "PowerSGD(rank=1)"),
    Way("DDP PowerSGD rank 2", "ddp", power_rank=2),
    Way("PowerSGD rank 2", "ours", "PowerSGD(rank=2)"),
    Way("momentum, top-k 1 %", "ours", _momentum("TopK(0.01)"), "momentum"),
    Way("momentum, top-k 0.1 %", "ours", _momentum("TopK(0.001)"), "momentum"),
    Way("error feedback, 1 bit", "ours", "ErrorFeedback(OneBit())"),
    Way("error feedback, top-k 1 %", "ours", "ErrorFeedback(TopK(0.01))"),
    Way("EF21, top-k 1 %", "ours", "EF21(TopK(0.01))"),
    Way("EF21 with momentum, top-k 1 %", "ours", "EF21(TopK(0.01), momentum=0.1)"),
    Way("DDP PowerSGD rank 1", "ddp", power_rank=1),
    Way("DDP PowerSGD rank 4", "ddp", power_rank=4),
    Way("DoubleSqueeze, 1 bit", "ours", _DOUBLE, exchange="double_pass"),
    Way("Horovod fp16", "horovod", fp16=True),
    Way("DDP dense", "ddp"),
    Way("DDP fp16", "ddp", fp16=True),
)


def _adam(compressor: str) -> str:
    return f"FrozenAdam({compressor}, clip=1.0)"


def _local(inner: str, steps: int) -> Way:
    name = {"adamw": "AdamW", "muon": "Muon"}[inner]
    method = f"ErrorFeedback({_signs(0.02)}, decay=0.95)"
    label = f"{name}'s updates, {steps} local steps, signs of 2 % of all"
    return Way(label, "ours", method, "update", inner, vectors=True, local_steps=steps)


_TEXT_WAYS = _by_name(
    Way("Horovod dense, AdamW", "horovod", inner="adamw"),
    Way("Muon's updates, signs of 2 % of all", "ours", _FEW_SIGNS, "update", "muon", vectors=True),
    Way(
        "AdamW's updates, signs of 2 % of all", "ours", _FEW_SIGNS, "update", "adamw", vectors=True
    ),
    _local("adamw", 30),
    _local("muon", 30),
    Way("FrozenAdam, signs of 4 %", "ours", _adam(_signs(0.04)), "momentum", "adamw", 0.1),
    Way("DDP PowerSGD rank 4, AdamW", "ddp", inner="adamw", power_rank=4),
    Way("Muon's updates, 1 bit", "ours", "ErrorFeedback(OneBit())", "update", "muon"),
    Way("FrozenAdam, 1 bit", "ours", _adam("OneBit()"), "momentum", "adamw", 0.1),
    Way("AdamW's updates, 1 bit", "ours", "ErrorFeedback(OneBit())", "update", "adamw"),
    Way("Horovod dense, Muon", "horovod", inner="muon"),
    Way("PowerSGD rank 4, AdamW", "ours", "PowerSGD(rank=4)", inner="adamw"),
    Way("DDP PowerSGD rank 8, AdamW", "ddp", inner="adamw", power_rank=8),
    Way("error feedback, top-k 1 %, AdamW", "ours", "ErrorFeedback(TopK(0.01))", inner="adamw"),
    Way("Horovod fp16, AdamW", "horovod", inner="adamw", fp16=True),
    Way("DDP dense, AdamW", "ddp", inner="adamw"),
)

TASKS = {
    "images": Task(20, "test accuracy, %", True, {"sgd": (0.1, 0.2, 0.4)}, _IMAGE_WAYS),
    "text": Task(
        4,
        "validation loss, nats per character",
        False,
        {"adamw": (0.002, 0.004, 0.008), "muon": (0.004, 0.008, 0.016)},
        _TEXT_WAYS,
    ),
}


class Run(NamedTuple):
    """One training."""

    task: str
    way: str
    lr: float
    epochs: int
    seed: int

    @property
    def label(self) -> str:
        return f"{self.task}: {self.way}, rate {self.lr}, {self.epochs} epochs, seed {self.seed}"


Results = dict[Run, dict[str, Any]]
Times = dict[tuple[str, str, str], dict[str, Any]]  # by task, way and rate of the network


def read(path: Path) -> Results:
    """The trainings that a file of results has."""
    rows = (row for row in _lines(path) if "score" in row)
    return {Run(*(row[field] for field in Run._fields)): row for row in rows}


def read_times(path: Path) -> Times:
    """The times of steps that a file of results has: of several the one of median time."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in _lines(path):
        if "network" in row:
            found.setdefault((row["task"], row["way"], row["network"]), []).append(row)
    for rows in found.values():
        rows.sort(key=lambda row: row["compressed_seconds"])
    return {key: rows[len(rows) // 2] for key, rows in found.items()}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """A half written line is skipped."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def best_rate(results: Results, task: str, way: str, epochs: int) -> float | None:
    """The rate that the short runs chose; None where one is missing."""
    plan = TASKS[task]
    rates = plan.rates[plan.ways[way].inner]
    scores = {r: results.get(Run(task, way, r, epochs, 0), {}).get("score") for r in rates}
    if None in scores.values():
        return None
    return (max if plan.higher else min)(rates, key=lambda rate: scores[rate])


def runs(
    results: Results, tasks: Sequence[str], words: Sequence[str], scale: float = 1.0
) -> Iterator[Run]:
    """Runs that are missing, in order: each way's rates and first seed, then the other seeds.

    Args:
        results: so far; the caller adds what it measures, before it asks for the next run.
        tasks: names.
        words: ways whose name has one of these.
        scale: of the numbers of epochs.
    """
    chosen = [(t, w) for t in tasks for w in TASKS[t].ways if any(word in w for word in words)]
    for part in ("first", "others"):
        for task, way in chosen:
            epochs = max(1, round(scale * TASKS[task].epochs))
            yield from _of_way(results, task, way, epochs, part)


def _of_way(results: Results, task: str, way: str, epochs: int, part: str) -> Iterator[Run]:
    plan, short = TASKS[task], max(1, epochs // 4)
    wanted = []
    if part == "first":
        wanted = [Run(task, way, r, short, 0) for r in plan.rates[plan.ways[way].inner]]
        yield from (run for run in wanted if run not in results)
    rate = best_rate(results, task, way, short)
    if rate is None:
        return
    seeds = plan.seeds[:1] if part == "first" else plan.seeds[1:]
    yield from (run for s in seeds if (run := Run(task, way, rate, epochs, s)) not in results)
