"""What a step of each method costs on a GPU, next to plain torch ops and to a pass over its memory.

    python benchmarks/gpu.py                        25 M float32
    python benchmarks/gpu.py --n 100000000 --json times.json

A step is what a rank of two does between its gradient and the direction: compress it, which ends
with a payload on the host, and decode two payloads, its own twice. The gradient, the memories and
the direction stay on the device. "host" is the same step where all of that lies in the CPU's memory
and the gradient and the direction are copied over. Medians of steps in turns, each of which ends
with `torch.cuda.synchronize`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate

import ef_horovod as ef
from ef_horovod.exchange.channel import finish_step
from ef_horovod.testing.echo import EchoTransport
from ef_horovod.training.choice import choose

RATIO = 0.01
METHODS = [
    ef.ErrorFeedback(ef.TopK(ratio=RATIO)),
    ef.ErrorFeedback(ef.TopK(ratio=RATIO / 10)),
    ef.EF21(ef.TopK(ratio=RATIO)),
    ef.ErrorFeedback(ef.Then(ef.TopK(ratio=RATIO), ef.Natural())),
    ef.ErrorFeedback(ef.RandomK(ratio=RATIO)),
    ef.ErrorFeedback(ef.RandomBlock(ratio=RATIO)),
    ef.ErrorFeedback(ef.OneBit()),
    ef.ErrorFeedback(ef.Cast("float16")),
    ef.NoFeedback(ef.QSGD(levels=7)),
    ef.NoFeedback(ef.Natural()),
]
ROUNDS = 9  # to take medians of
BASE, TORCH_TOP_K = "torch: add + copy", "torch: add, topk, gather, zero"
Run = Callable[[], None]


class Steps:
    """A channel of one rank of two whose peer says the same."""

    def __init__(self, method: ef.Method, gradient: torch.Tensor) -> None:
        self.source = gradient
        self.channel = choose("auto", method).open("x", gradient, method, EchoTransport(2))
        self.step = 0

    def __call__(self) -> None:
        self.channel.gradient.copy_(self.source)
        self.channel.start(self.step)
        directions = finish_step([self.channel])
        assert directions is not None, "the gradient is finite"
        self.direction, self.step = directions[0], self.step + 1


class OnHost(Steps):
    """The same in the CPU's memory, with the copies there and back."""

    def __init__(self, method: ef.Method, gradient: torch.Tensor) -> None:
        super().__init__(method, torch.empty(gradient.numel(), pin_memory=True))
        self.on_device = gradient
        self.back = torch.empty_like(gradient)

    def __call__(self) -> None:
        self.source.copy_(self.on_device)
        super().__call__()
        self.back.copy_(self.direction)


def torch_ops(gradient: torch.Tensor) -> dict[str, Run]:
    """The least that error feedback does to memory, and top-k as one writes it in torch."""
    error, out = torch.zeros_like(gradient), torch.zeros_like(gradient)
    k = max(1, int(RATIO * gradient.numel()))

    def bare() -> None:
        torch.add(gradient, error, out=error)
        out.copy_(error)
        error.zero_()

    def top_k() -> None:
        error.add_(gradient)
        indices = torch.topk(error.abs(), k, sorted=False).indices
        values = error[indices]
        error[indices] = 0.0
        out.zero_()
        out[indices] = values

    return {BASE: bare, TORCH_TOP_K: top_k}


def measure(runs: dict[str, Run]) -> dict[str, float]:
    """Median milliseconds of each, in turns, after two rounds of warming up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-2, ROUNDS):
        for name, run in runs.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            torch.cuda.synchronize()
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(own) for name, own in times.items()}


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=25_000_000, help="entries (default: 25 million)")
    parser.add_argument("--host", action="store_true", help="also each method on the host")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: error: torch sees no GPU, expected one", file=sys.stderr)
        return 2
    gradient = torch.randn(
        options.n, device="cuda", generator=torch.Generator("cuda").manual_seed(0)
    )
    for method in METHODS:  # kernels are compiled, or loaded, when they are first called
        Steps(method, gradient)()
    steps = {repr(method): Steps(method, gradient) for method in METHODS}
    hosts = {f"host: {m!r}": OnHost(m, gradient) for m in METHODS} if options.host else {}
    medians = measure({**torch_ops(gradient), **steps, **hosts})
    rows = []
    for name, milliseconds in medians.items():
        row = {"step": name, "ms": milliseconds, "of add + copy": milliseconds / medians[BASE]}
        if name in steps:
            stats = steps[name].channel.stats()
            row["compress ms"] = 1e3 * stats.seconds_compress / stats.steps
            row["decode ms"] = 1e3 * stats.seconds_decompress / stats.steps
            row["MB sent"] = stats.bytes_out / stats.steps / 1e6
        rows.append(row)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.n:,} float32\n")
    print(tabulate(rows, headers="keys", floatfmt=(".1f", ".2f", ".1f", ".2f", ".2f", ".3f")))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
