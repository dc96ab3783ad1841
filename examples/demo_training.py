"""What the demos of all frameworks share: arguments, batches, step sizes, and what is measured."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import lru_cache
from statistics import median
from typing import Any, NamedTuple, Protocol

import demo_data
import demo_report
import numpy as np
from demo_data import Images
from demo_loopback import idle_rate, loopback_bytes, use_tcp, wait_for_all
from demo_methods import ROWS, Row, Sent
from demo_options import add_options
from demo_report import LOG_EVERY, LogEntry, Result
from tqdm import tqdm  # pip install tqdm

BATCH = 16  # images per step and rank
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
UNTIMED_STEPS = 5  # the first ones compile kernels and compare configs


class Training(Protocol):
    """A network that is trained by one method, on this rank."""

    parameters: int

    def set_step_size(self, size: float) -> None:
        """For the steps to come."""

    def step(self, batch: np.ndarray) -> float:
        """One step with these images; the loss on them."""

    def sent(self) -> Sent:
        """By this rank so far."""

    def accuracy(self) -> float:
        """Share of the test images that are recognised."""


# From a row of the table, a seed, this rank's training images and all test images.
Start = Callable[[Row, int, Images, Images], Training]


class Framework(NamedTuple):
    """What the demo has to know of it."""

    name: str
    hvd: Any  # its Horovod module
    start: Start


def main(framework: Framework, description: str | None) -> None:
    """Run all methods with all seeds, and show what came out."""
    arguments, hvd = parse(description), framework.hvd
    use_tcp()
    hvd.init()
    load = lru_cache(lambda fold: demo_data.load(arguments.data, hvd.rank(), hvd.size(), fold))
    train, test = load(0)
    control = idle_rate(hvd, 0.5 if arguments.quick else 2.0)
    runs = [(key, seed) for key in arguments.methods for seed in range(arguments.seeds)]
    steps = arguments.epochs * (len(train.y) // BATCH)
    results = []
    with tqdm(total=steps * len(runs), disable=hvd.rank() != 0, unit="step") as bar:
        for key, seed in runs:
            bar.set_description(f"{key}, seed {seed}")
            train, test = load(0 if arguments.data else seed % demo_data.FOLDS)
            training = framework.start(ROWS[key], seed, train, test)
            batches = shuffled_batches(len(train.y), arguments.epochs, seed, hvd.rank())
            results.append(run(hvd, key, seed, training, batches, arguments.lr, control, bar))
    if hvd.rank() == 0:
        measured_with = (
            f"{framework.name}, {hvd.size()} ranks, {training.parameters:,} parameters, "
            f"{len(train.y)} training images for each rank, {len(test.y)} test images, {steps} "
            f"steps of {BATCH} images a rank, SGD with momentum {MOMENTUM} and step "
            f"sizes up to {arguments.lr}, mean accuracy and median time of {arguments.seeds} "
            f"seed{'s' * (arguments.seeds > 1)}"
        )
        text = demo_report.write(results, arguments.out, measured_with)
        print(f"\n{text}\nTable, plot and log are in {arguments.out}/", flush=True)
    hvd.shutdown()


def parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.epochs = 1, 2
    return arguments


def run(
    hvd: Any,
    key: str,
    seed: int,
    training: Training,
    batches: list[np.ndarray],
    highest_step_size: float,
    control: float | None,
    bar: Any,
) -> Result:
    """Train a network by one method, test it, and say what was sent."""
    trace = Trace()
    wait_for_all(hvd)
    counted, begin = loopback_bytes(hvd), time.perf_counter()
    for batch, size in zip(batches, one_cycle(len(batches), highest_step_size), strict=True):
        training.set_step_size(size)
        trace.step(training, batch)
        bar.update()
    wait_for_all(hvd)
    counted_after, elapsed = loopback_bytes(hvd), time.perf_counter() - begin
    share = hvd.size() * len(batches)  # of all ranks' bytes: one worker's in one step
    return Result(
        key=key,
        label=ROWS[key].label,
        seed=seed,
        accuracy=training.accuracy(),
        steps=len(batches),
        bytes_sent=training.sent().everything / len(batches),
        bytes_sent_compressed=training.sent().compressed / len(batches),
        bytes_kernel=None if counted is None else (counted_after - counted) / share,
        bytes_control=None if control is None else control * elapsed / share,
        seconds_per_step=median(trace.seconds[UNTIMED_STEPS:]),
        log=trace.over_ranks(hvd, f"{key}.{seed}"),
    )


class Trace:
    """What a run looked like, step by step; sends nothing while it goes on."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._losses: list[float] = []
        self._sent: list[tuple[int, Sent]] = []

    def step(self, training: Training, batch: np.ndarray) -> None:
        """Take a step and keep what it showed."""
        begin = time.perf_counter()
        loss = training.step(batch)
        self.seconds.append(time.perf_counter() - begin)
        if len(self._losses) % LOG_EVERY == 0:
            self._sent.append((len(self._losses), training.sent()))
        self._losses.append(loss)

    def over_ranks(self, hvd: Any, name: str) -> list[LogEntry]:
        """The logged steps with the mean loss of all ranks; collective."""
        everyones = hvd.allgather_object(self._losses, name=f"losses.{name}")
        losses = np.mean(everyones, axis=0).tolist()
        return [LogEntry(step, losses[step], sent.everything) for step, sent in self._sent]


def shuffled_batches(n: int, epochs: int, seed: int, rank: int) -> list[np.ndarray]:
    """Indices of every step's images, the same for all methods and frameworks."""
    generator = np.random.default_rng((seed, rank))
    order = [generator.permutation(n) for _ in range(epochs)]
    full = n // BATCH * BATCH
    return [part for epoch in order for part in epoch[:full].reshape(-1, BATCH)]


def one_cycle(steps: int, highest: float) -> list[float]:
    """Step sizes that rise for a tenth of the steps and then fall, along half a cosine each.

    The numbers are those of PyTorch's OneCycleLR.
    """

    def between(start: float, end: float, share: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))

    top, first = max(0.1 * steps - 1, 1e-9), highest / 25  # ten steps would divide by zero
    return [
        between(first, highest, i / top)
        if i <= top
        else between(highest, first / 1e4, (i - top) / (steps - 1 - top))
        for i in range(steps)
    ]
