"""Small networks on CIFAR-10 whose parameters are one flat vector, and many trainings of them.

torch is imported when a network is made, so that all other experiments run without it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import ef_horovod as ef
from ef_horovod.common.extras import require
from experiments.counting import Counts, counted
from experiments.images import Images, load_cifar10
from experiments.workers import Workers

WORKERS = 4
LOSS_IMAGES = 2000  # of the training set: what the training loss is measured on

_A, _R = TypeVar("_A"), TypeVar("_R")


@dataclass(frozen=True)
class Convolutional:
    """Convolutions 3 -> 24 (5 x 5), 24 -> 48 and 48 -> 64 (3 x 3), the first two with stride 2,
    then a hidden layer and 10 classes; ReLU in between, no normalisation.

    Args:
        hidden: units of the hidden layer; 64 make 106,202 parameters.
    """

    hidden: int

    def build(self) -> Any:
        """A `torch.nn.Sequential`."""
        from torch import nn

        return nn.Sequential(
            nn.Conv2d(3, 24, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(48, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, 10),
        )


@dataclass(frozen=True)
class Dense:
    """Hidden layers with ReLU, then 10 classes: many parameters for little work.

    Args:
        widths: of the hidden layers; (512, 512) make 661,514 parameters.
    """

    widths: tuple[int, ...]

    def build(self) -> Any:
        """A `torch.nn.Sequential`."""
        from torch import nn

        layers: list[Any] = [nn.Flatten()]
        for before, width in pairwise((3 * 16 * 16, *self.widths)):
            layers += [nn.Linear(before, width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(self.widths[-1], 10))


@dataclass(frozen=True)
class Rate:
    """A learning rate that grows to `base` at first and is divided by ten now and then.

    Args:
        base: the largest.
        drops: when, as parts of the training.
        warm_up: part of the training in which the rate grows linearly.
    """

    base: float
    drops: tuple[float, ...]
    warm_up: float = 0.0

    def __call__(self, step: int, steps: int) -> float:
        """At a step of so many."""
        dropped = self.base / 10 ** sum(step >= part * steps for part in self.drops)
        return dropped * min(1.0, (step + 1) / max(self.warm_up * steps, 1))


@dataclass(frozen=True)
class Plan:
    """One training.

    Args:
        label: for tables and plots.
        method: what gradients go through.
        rate: the learning rate.
        steps: how many.
        seed: of the start, the batches and random compressors.
        shown: whether to look at loss and accuracy on the way.
    """

    label: str
    method: ef.Method
    rate: Rate
    steps: int
    seed: int = 0
    shown: bool = True


@dataclass
class Trained:
    """What a training gave; lists have one number for each look at the network.

    Attributes:
        parameters: d.
        steps: done at each look.
        loss: mean cross-entropy over LOSS_IMAGES training images.
        accuracy: on the test set, 0 to 1.
        up, down: bytes of a worker to a server and back so far; all numbers are means over workers.
        sent: bytes of a worker to all others so far, without a server.
        entries: kept by a worker in all.
        error: mean over workers of sum_t ||e_t||^2.
    """

    plan: Plan
    parameters: int
    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    up: list[float] = field(default_factory=list)
    down: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    entries: float = 0.0
    error: float = 0.0

    def give_up(self, looks: list[int], up: float, down: float) -> None:
        """It diverged: the loss is infinite from here on, with so many bytes in every step."""
        missing = [step for step in looks if step not in self.steps]
        self.steps += missing
        self.loss += [math.inf] * len(missing)
        self.accuracy += [math.nan] * len(missing)
        self.up, self.down = [up * s for s in self.steps], [down * s for s in self.steps]
        self.sent = [math.nan] * len(self.steps)

    @property
    def entries_a_step(self) -> float:
        """On average over all steps."""
        return self.entries / self.plan.steps


class Network:
    """Loss and gradients at a flat vector of parameters.

    Args:
        shape: of the network.
        images: all of them; a worker sees every WORKERS-th of the training set.
        batch: of a worker.
    """

    def __init__(self, shape: Convolutional | Dense, images: Images, batch: int) -> None:
        import torch

        torch.set_num_threads(1)
        self._torch, self._shape, self._batch = torch, shape, batch
        self._net = shape.build()
        self._names = [name for name, _ in self._net.named_parameters()]
        self._shapes = [p.shape for p in self._net.parameters()]
        self._train, self._test = (
            torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
            for x in images.normalised()
        )
        self._labels = torch.from_numpy(images.train_labels)
        self._test_labels = torch.from_numpy(images.test_labels)

    def start(self, seed: int) -> np.ndarray:
        """float32[d], the same for a seed."""
        rng = np.random.default_rng(seed)
        parts = [
            rng.normal(0, np.sqrt(2 / shape[1:].numel()), shape.numel())  # He et al. (2015)
            if len(shape) > 1
            else np.zeros(shape.numel())
            for shape in self._shapes
        ]
        return np.concatenate(parts).astype(np.float32)

    def gradient(self, worker: int, x: np.ndarray, step: int, seed: int) -> np.ndarray:
        """float32[d], over a batch that follows from (seed, worker, step) alone."""
        rows = np.arange(worker, len(self._labels), WORKERS)
        rng = np.random.default_rng((seed, worker, step))
        rows = self._torch.from_numpy(rows[rng.integers(0, rows.size, self._batch)])
        flat = self._torch.from_numpy(x).requires_grad_()
        loss = self._loss(self._scores(flat, self._train[rows]), self._labels[rows])
        (gradient,) = self._torch.autograd.grad(loss, flat)
        return gradient.numpy()

    def training_loss(self, x: np.ndarray) -> float:
        """Mean cross-entropy over the first LOSS_IMAGES images of the training set; inf for NaN."""
        scores = self._at(x, self._train[:LOSS_IMAGES])
        loss = float(self._loss(scores, self._labels[:LOSS_IMAGES]))
        return math.inf if math.isnan(loss) else loss

    def accuracy(self, x: np.ndarray) -> float:
        """Share of the test set that is classified right."""
        right = self._at(x, self._test).argmax(1) == self._test_labels
        return float(right.float().mean())

    def _at(self, x: np.ndarray, images: Any) -> Any:
        with self._torch.no_grad():
            flat = self._torch.from_numpy(x)
            return self._torch.cat([self._scores(flat, part) for part in images.split(1000)])

    def _scores(self, flat: Any, images: Any) -> Any:
        parts = flat.split([shape.numel() for shape in self._shapes])
        views = (part.view(shape) for part, shape in zip(parts, self._shapes, strict=True))
        parameters = dict(zip(self._names, views, strict=True))
        return self._torch.func.functional_call(self._net, parameters, (images,))

    def _loss(self, scores: Any, labels: Any) -> Any:
        return self._torch.nn.functional.cross_entropy(scores, labels)


@dataclass
class Trainer:
    """Trains networks, in this process or as a rank.

    Args:
        shape: of the networks.
        images: to learn and to test on.
        batch: of a worker.
        looks: how often a training looks at its network.
        workers: where gradients are computed.
    """

    shape: Convolutional | Dense
    images: Images
    batch: int
    looks: int
    workers: Workers

    @cached_property
    def network(self) -> Network:
        return Network(self.shape, self.images, self.batch)

    def train(self, plan: Plan) -> Trained:
        """Run it; only the leading process looks at the network."""
        counts, start = Counts(), self.network.start(plan.seed)
        trained = Trained(plan, start.size)
        done, looks = 0, self.look_steps(plan.steps)

        def observe(x: np.ndarray) -> dict[str, Any]:
            nonlocal done
            done += 1
            if plan.shown and done in looks:
                trained.steps.append(done)
                trained.up.append(self._mean(counts.up))
                trained.down.append(self._mean(counts.down))
                if self.workers.leads:
                    trained.loss.append(self.network.training_loss(x))
                    trained.accuracy.append(self.network.accuracy(x))
            return {}

        try:
            history = self.workers.run(
                counted(plan.method, counts),
                lambda worker, x, step: self.network.gradient(worker, x, step, plan.seed),
                start,
                workers=WORKERS,
                steps=plan.steps,
                step_size=lambda step: plan.rate(step, plan.steps),
                observe=observe,
                seed=plan.seed,
            )
            trained.sent = [history[step - 1]["bytes_sent"] for step in trained.steps]
        except ef.NonFiniteError:  # on all ranks in the same step
            up, down = counts.up / max(counts.messages, 1), self._mean(counts.down) / max(done, 1)
            trained.give_up(looks, up, down)
        trained.entries, trained.error = self._mean(counts.entries), self._mean(counts.error)
        return trained

    def look_steps(self, steps: int) -> list[int]:
        """After which steps of so many a training looks at its network."""
        return sorted({-(-steps * i // self.looks) for i in range(1, self.looks + 1)})

    def _mean(self, total: float) -> float:
        """Over all workers, of a sum over those of this process; every rank calls it."""
        return self.workers.sum(total) / WORKERS

    def each(self, work: Callable[[Trainer, _A], _R], tasks: Sequence[_A]) -> list[_R]:
        """[work(trainer, task) for each task]; two at a time where all workers are in one process.

        Args:
            work: a function of a module, so that it can be sent to another process.
            tasks: likewise.
        """
        from tqdm import tqdm

        if self.workers.transport is not None:
            quiet = None if self.workers.leads else True  # None: unless it is a terminal
            return [work(self, task) for task in tqdm(tasks, disable=quiet)]
        running = [self._pool.submit(_do, work, task) for task in tasks]
        return [task.result() for task in tqdm(running, disable=None)]

    @cached_property
    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            min(2, _cores()),
            mp_context=get_context("spawn"),
            initializer=_take,
            initargs=(replace(self),),
        )


def train(trainer: Trainer, plan: Plan) -> Trained:
    """For `Trainer.each`."""
    return trainer.train(plan)


def best_of(trainer: Trainer, plans: Sequence[Plan]) -> Trained:
    """The training that ends with the lowest training loss, on all ranks the same."""
    trained = trainer.each(train, plans)
    losses = [t.loss[-1] for t in trained] if trainer.workers.leads else [0.0]
    return trained[int(trainer.workers.sum(int(np.argmin(losses))))]


def mean_curve(trained: Sequence[Trained], what: str) -> np.ndarray:
    """float64[looks]: mean over trainings, which differ in their seeds."""
    return np.mean([getattr(one, what) for one in trained], axis=0)


def mean_and_spread(trained: Sequence[Trained], what: str) -> str:
    """At the end of the trainings: "0.512 +- 0.004", half the range; of one alone "0.512"."""
    ends = [getattr(one, what)[-1] for one in trained]
    lost = sum(not math.isfinite(end) for end in ends)
    if lost:
        return f"diverged on {lost} of {len(ends)} seeds"
    spread = f" +- {(max(ends) - min(ends)) / 2:.3f}" if len(ends) > 1 else ""
    return f"{np.mean(ends):.3f}{spread}"


def make_trainer(
    workers: Workers, data: Path, quick: bool, *, shape: Convolutional | Dense, batch: int
) -> Trainer | None:
    """A trainer on all of CIFAR-10, or on a small part of it; None on ranks without a part in it.

    Raises:
        ModuleNotFoundError: torch is not installed.
        Refused: CIFAR-10 is not in `data`, or cannot be read.
    """
    part = workers.part(WORKERS)
    if part is None:
        return None
    images = load_images(part, data, quick)
    return Trainer(shape, images, batch, looks=2 if quick else 8, workers=part)


def load_images(workers: Workers, data: Path, quick: bool) -> Images:
    """All of CIFAR-10, or a small part of it; read once and sent to all ranks.

    Raises:
        ModuleNotFoundError, Refused: as `make_trainer`.
    """
    require("torch", "an experiment with networks")
    part = {"train": 4000, "test": 1000} if quick else {}
    images: Images = workers.from_lead(lambda: load_cifar10(data, **part))
    return images


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


_trainer: Trainer | None = None  # of a process that works for another one


def _take(trainer: Trainer) -> None:
    global _trainer
    _trainer = trainer


def _do(work: Callable[[Trainer, Any], Any], task: Any) -> Any:
    assert _trainer is not None
    return work(_trainer, task)
