"""Train a small convolutional network over Horovod with and without error feedback, and compare.

    horovodrun -np 2 python examples/demo_torch.py

`launch/demo` makes the environment and runs this. Every method trains the same network on the same
batches with the same optimizer, for every seed; at the end come a table, a plot and a log.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import demo_data
import demo_report
import horovod.torch as hvd
import torch
from demo_data import Images
from demo_methods import DEFAULT_ROWS, ROWS, Sent, distribute
from demo_network import accuracy, idle_rate, loopback_bytes, small_cnn, use_tcp
from demo_report import LOG_EVERY, LogEntry, Result
from torch import nn
from tqdm import tqdm

UNTIMED_STEPS = 5  # the first ones compile kernels and compare configs


def main() -> None:
    arguments = parse()
    use_tcp()
    hvd.init()
    torch.set_num_threads(1)  # the ranks share the cores
    train, test = demo_data.load(arguments.data, arguments.limit, hvd.rank(), hvd.size())
    control = idle_rate(0.5 if arguments.quick else 2.0)
    runs = [(key, seed) for key in arguments.methods for seed in range(arguments.seeds)]
    steps = arguments.epochs * (len(train.y) // arguments.batch)
    results = []
    with tqdm(total=steps * len(runs), disable=hvd.rank() != 0, unit="step") as bar:
        for key, seed in runs:
            bar.set_description(f"{key}, seed {seed}")
            results.append(run(key, seed, train, test, arguments, control, bar))
    if hvd.rank() == 0:
        text = demo_report.write(results, arguments.out, describe(arguments, train, test, steps))
        print(f"\n{text}\nTable, plot and log are in {arguments.out}/", flush=True)
    hvd.shutdown()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help=demo_data.DATA_HELP)
    parser.add_argument("--limit", type=int, metavar="N", help="use N training images only")
    parser.add_argument("--methods", nargs="+", choices=ROWS, default=DEFAULT_ROWS)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (%(default)s)")
    parser.add_argument("--epochs", type=int, default=40, help="(%(default)s)")
    parser.add_argument(
        "--batch", type=int, default=16, help="images a step on a rank (%(default)s)"
    )
    parser.add_argument("--lr", type=float, default=0.03, help="highest step size (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo-results"), metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="1 seed, 2 epochs: does it run?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.epochs = 1, 2
    return arguments


def describe(arguments: argparse.Namespace, train: Images, test: Images, steps: int) -> str:
    """What the numbers were measured with."""
    parameters = sum(p.numel() for p in make_model(train).parameters())
    return (
        f"{hvd.size()} ranks, {parameters:,} parameters, {len(train.y)} training images for each "
        f"rank, {len(test.y)} test images, {steps} steps of {arguments.batch} images a rank, "
        f"SGD with momentum 0.9 and step sizes up to {arguments.lr}, median of {arguments.seeds} "
        f"seed{'s' * (arguments.seeds > 1)}"
    )


def make_model(train: Images, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return small_cnn(channels=train.x.shape[1], height=train.x.shape[2])


def run(
    key: str,
    seed: int,
    train: Images,
    test: Images,
    arguments: argparse.Namespace,
    control: float | None,
    bar: Any,
) -> Result:
    """Train a network by one method, test it, and say what was sent."""
    model = make_model(train, seed)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    plain = torch.optim.SGD(model.parameters(), lr=arguments.lr, momentum=0.9, weight_decay=5e-4)
    optimizer, sent = distribute(ROWS[key], plain, model)
    batches = shuffled_batches(len(train.y), arguments.batch, arguments.epochs, seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.lr, total_steps=len(batches), pct_start=0.1, cycle_momentum=False
    )
    trace = Trace()
    hvd.barrier()
    counted, begin = loopback_bytes(), time.perf_counter()
    for batch in batches:
        trace.add(train_step(model, optimizer, train, batch), sent)
        schedule.step()
        bar.update()
    hvd.barrier()
    counted_after, elapsed = loopback_bytes(), time.perf_counter() - begin
    share = hvd.size() * len(batches)  # of all ranks' bytes: one worker's in one step
    return Result(
        key=key,
        label=ROWS[key].label,
        seed=seed,
        accuracy=accuracy(model, test.x, test.y),
        steps=len(batches),
        bytes_sent=sent().everything / len(batches),
        bytes_sent_compressed=sent().compressed / len(batches),
        bytes_kernel=None if counted is None else (counted_after - counted) / share,
        bytes_control=None if control is None else control * elapsed / share,
        seconds_per_step=median(trace.seconds[UNTIMED_STEPS:]),
        log=trace.over_ranks(f"{key}.{seed}"),
    )


def train_step(
    model: nn.Module, optimizer: Any, train: Images, batch: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """One step; the loss on this rank's batch, and the seconds it took."""
    begin = time.perf_counter()
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(train.x[batch]), train.y[batch])
    loss.backward()
    optimizer.step()
    return loss.detach(), time.perf_counter() - begin


class Trace:
    """What a run looked like, step by step; sends nothing while it goes on."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._losses: list[torch.Tensor] = []
        self._sent: list[tuple[int, Sent]] = []

    def add(self, step: tuple[torch.Tensor, float], sent: Any) -> None:
        if len(self._losses) % LOG_EVERY == 0:
            self._sent.append((len(self._losses), sent()))
        self._losses.append(step[0])
        self.seconds.append(step[1])

    def over_ranks(self, name: str) -> list[LogEntry]:
        """The logged steps with the mean loss of all ranks; collective."""
        losses = hvd.allreduce(torch.stack(self._losses), name=f"losses.{name}").tolist()
        return [LogEntry(step, losses[step], sent.everything) for step, sent in self._sent]


def shuffled_batches(n: int, batch: int, epochs: int, seed: int) -> list[torch.Tensor]:
    """Indices of every step's images, the same for all methods."""
    generator = torch.Generator().manual_seed(1000 * seed + hvd.rank())
    return [
        part
        for _ in range(epochs)
        for part in torch.randperm(n, generator=generator).split(batch)
        if len(part) == batch
    ]


if __name__ == "__main__":
    main()
