"""What compression costs on one thread, next to plain torch ops and to a bare pass over memory.

    python benchmarks/compress.py                   25 M float32, top 1 %, 1 bit, index sets
    python benchmarks/compress.py --check           exit code 1 if a limit is missed
    python benchmarks/compress.py --n 1000000 --repeat 20 --json times.json

A step of error feedback adds the error to the gradient, compresses and keeps what was lost. All
contenders take turns, so that a slow moment of the machine meets each of them; medians are shown.
Index sets are random ones, and clustered ones: runs of 100 neighbours at random places. The last
table has a row for each compressor and method of the registry, those of --import too, in a rank of
two that hears its own message twice.
"""

from __future__ import annotations

import os

# One thread: these are read when the libraries below are imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["NUMBA_NUM_THREADS"] = "1"

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import ef_horovod as ef
import ef_horovod.arrays.numpy as xp
from ef_horovod.arrays.numpy_indices import indices_nbytes
from ef_horovod.cli.listing import examples_of
from ef_horovod.common.registry import add_import_option, load
from ef_horovod.exchange.channel import finish_step
from ef_horovod.exchange.stats import ChannelStats
from ef_horovod.methods.registry import METHODS
from ef_horovod.testing.echo import EchoTransport
from ef_horovod.testing.pairs import every_compressor
from ef_horovod.training.choice import choose

RATIO = 0.01
BASE, TORCH_TOP_K, TORCH_ONE_BIT = (
    "numpy add + copy",
    "torch ops: top-k step",
    "torch ops: 1-bit step",
)
TOP_K, ONE_BIT = "ErrorFeedback(TopK(0.01))", "ErrorFeedback(OneBit())"
CODED = "ErrorFeedback(Then(TopK, Natural))"
LIMITS = [  # what, at most this many times the time of what
    (TOP_K, 1 / 8, TORCH_TOP_K),
    (TOP_K, 4, BASE),
    (ONE_BIT, 1 / 3, TORCH_ONE_BIT),
    (CODED, 1.2, TOP_K),
]
DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.1)
REGISTERED_N = 1_000_000  # entries, at most, of the table of all that is registered
FEWEST_INDICES = 2000  # smaller sets are not looked at: the work for a call is most of it
NS_PER_INDEX, OVER_ENTROPY = 15.0, 1.13  # limits of index sets
Step = Callable[[], object]


class CodedSet(NamedTuple):
    """Index sets of one size: what they cost, and medians of nanoseconds an index."""

    density: float
    bits: float  # of an index
    entropy: float  # of an index, in bits
    encode: float
    decode: float
    encode_clustered: float
    decode_clustered: float


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=25_000_000, help="entries (default: 25 million)")
    parser.add_argument("--repeat", type=int, default=9, help="rounds to take medians of")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times here")
    add_import_option(parser)
    parser.add_argument("--check", action="store_true", help="fail if a limit is missed")
    return parser.parse_args(words)


class Feedback:
    """Steps of a method; `gradient` is overwritten by each and refilled before the next."""

    def __init__(self, method: ef.Method, gradient: np.ndarray) -> None:
        self.method, self.gradient = method, gradient
        self.worker, self.server = method.init(gradient)
        self.spare = np.empty_like(gradient)

    def refill(self, source: np.ndarray) -> None:
        if np.shares_memory(self.worker[0], self.gradient):  # it took the gradient's memory
            self.gradient, self.spare = self.spare, self.gradient
        np.copyto(self.gradient, source)

    def step(self) -> None:
        given_up = self.worker[0]
        self.message, self.worker = self.method.push(self.worker, self.gradient)
        self.spare = given_up if self.worker[0] is not given_up else self.spare

    def settle(self) -> None:
        """Untimed: what the rest of a step does to the states."""
        aggregate, self.server = self.method.reduce(self.server, [self.message], ef.Key(workers=1))
        _, self.worker = self.method.pull(self.worker, aggregate)


class Bare:
    """The least that error feedback can do to memory: add once, write once."""

    def __init__(self, gradient: np.ndarray) -> None:
        self.gradient, self.error = gradient, np.zeros_like(gradient)
        self.out = np.zeros_like(gradient)

    def refill(self, source: np.ndarray) -> None:
        self.error.fill(0.0)

    def step(self) -> None:
        np.add(self.gradient, self.error, out=self.error)
        np.copyto(self.out, self.error)

    def settle(self) -> None:
        pass


class TorchTopK:
    """The same step as it is written in torch: add, abs, topk, gather, zero."""

    def __init__(self, gradient: np.ndarray) -> None:
        self.gradient = torch.from_numpy(gradient)
        self.error = torch.zeros(len(gradient))

    def refill(self, source: np.ndarray) -> None:
        self.gradient.copy_(torch.from_numpy(source))

    def step(self) -> None:
        total = self.error.add_(self.gradient)
        k = max(1, int(RATIO * len(total)))
        indices = torch.topk(total.abs(), k, sorted=False).indices
        self.message = (indices, total[indices])
        total[indices] = 0.0

    def settle(self) -> None:
        pass


class TorchOneBit(TorchTopK):
    """The same step as it is written in torch: add, abs, mean, compare, pack, subtract."""

    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)

    def step(self) -> None:
        total = self.error.add_(self.gradient)
        scale = total.abs().mean()
        positive = total >= 0
        padded = torch.nn.functional.pad(positive, (0, -len(total) % 8))
        bits = (padded.view(-1, 8) * self.weights).sum(1, dtype=torch.uint8)
        total.sub_(torch.where(positive, scale, -scale))
        self.message = (scale, bits)


def measure_steps(n: int, repeat: int) -> dict[str, list[float]]:
    """Seconds of each contender's steps, in turns, after two rounds of warming up."""
    source = np.random.default_rng(0).normal(size=n).astype(np.float32)
    contenders = {
        BASE: Bare(source.copy()),
        TORCH_TOP_K: TorchTopK(source.copy()),
        TOP_K: Feedback(ef.ErrorFeedback(ef.TopK(RATIO)), source.copy()),
        CODED: Feedback(ef.ErrorFeedback(ef.Then(ef.TopK(RATIO), ef.Natural())), source.copy()),
        "ErrorFeedback(RandomSparsify(0.01))": Feedback(
            ef.ErrorFeedback(ef.RandomSparsify(RATIO)), source.copy()
        ),
        "EF21(TopK(0.01))": Feedback(ef.EF21(ef.TopK(RATIO)), source.copy()),
        TORCH_ONE_BIT: TorchOneBit(source.copy()),
        ONE_BIT: Feedback(ef.ErrorFeedback(ef.OneBit()), source.copy()),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-2, repeat):
        source = np.roll(source, 1_234_567)  # other entries grow large at each step
        for name, contender in contenders.items():
            contender.refill(source)
            seconds = clock(contender.step)
            contender.settle()
            if turn >= 0:
                times[name].append(seconds)
    return times


def measure_parts(n: int, repeat: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of decoding, and the number of indices of top-k."""
    x = np.random.default_rng(1).normal(size=n).astype(np.float32)
    top_k, one_bit = ef.TopK(RATIO).compress(x), ef.OneBit().compress(x)
    indices = int(np.count_nonzero(top_k.decompress()))
    parts: dict[str, Step] = {
        "add_to of TopK": lambda: top_k.add_to(x),
        "add_to of OneBit": lambda: one_bit.add_to(x),
    }
    return take_turns(parts, repeat), indices


def measure_codes(n: int, repeat: int) -> list[CodedSet]:
    """A row for each density that gives at least FEWEST_INDICES below n."""
    rows, rng = [], np.random.default_rng(2)
    for density in DENSITIES:
        k = int(density * n) // 100 * 100
        if k < FEWEST_INDICES:
            continue
        runs = np.sort(rng.choice(n // 100, k // 100, replace=False))
        clustered = (100 * runs[:, None] + np.arange(100)).ravel()
        times = time_codes([np.sort(rng.choice(n, k, replace=False)), clustered], n, repeat)
        bits = 8 * indices_nbytes(k, n) / k
        rows.append(CodedSet(density, bits, entropy(k, n) / k, *(1e9 * t / k for t in times)))
    return rows


def measure_registered(n: int, repeat: int) -> list[ChannelStats]:
    """Steps of a channel with each compressor, without feedback, and with each method."""
    methods: list[ef.Method] = [ef.NoFeedback(compressor) for compressor in every_compressor()]
    methods += [method for kind in METHODS.values() for method in examples_of(kind)]
    x = np.random.default_rng(3).normal(size=n).astype(np.float32)
    for method in methods:  # kernels are compiled, or loaded, when they are first called
        take_steps(method, x, 1)
    return [take_steps(method, x, repeat) for method in methods]


def take_steps(method: ef.Method, x: np.ndarray, steps: int) -> ChannelStats:
    channel = choose("auto", method).open("x", x, method, EchoTransport(2))
    for step in range(steps):
        np.copyto(channel.gradient, x)
        channel.start(step)
        finish_step([channel])
    return channel.stats()


def entropy(k: int, n: int) -> float:
    """log2 of the number of sets of k indices below n."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def time_codes(sets: list[np.ndarray], n: int, repeat: int) -> list[float]:
    """Median seconds of encoding and decoding each set."""
    x = np.empty(n, np.float32)  # only its length counts
    steps: dict[str, Step] = {}
    for i, indices in enumerate(sets):
        code = xp.encode_indices(x, indices)
        steps[f"encode {i}"] = partial(xp.encode_indices, x, indices)
        steps[f"decode {i}"] = partial(xp.decode_indices, x, code, len(indices))
    return [statistics.median(times) for times in take_turns(steps, repeat).values()]


def take_turns(steps: dict[str, Step], repeat: int) -> dict[str, list[float]]:
    """Seconds of each step, after a round of warming up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-1, repeat):
        for name, step in steps.items():
            seconds = clock(step)
            if turn >= 0:
                times[name].append(seconds)
    return times


def clock(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def show(steps: dict[str, float], parts: dict[str, float], n: int, indices: int) -> None:
    print(f"{n:,} float32, one thread, medians\n")
    print(
        f"{'step: accumulate, compress, residual':38}{'ms':>9}{'ns/element':>12}{'of add+copy':>13}"
    )
    for name, seconds in steps.items():
        print(
            f"{name:38}{1e3 * seconds:9.1f}{1e9 * seconds / n:12.2f}{seconds / steps[BASE]:13.2f}"
        )
    print(f"\n{'part':38}{'ms':>9}{'ns/element':>12}{'ns/index':>13}")
    for name, seconds in parts.items():
        per_index = f"{1e9 * seconds / indices:13.2f}" if "OneBit" not in name else ""
        print(f"{name:38}{1e3 * seconds:9.1f}{1e9 * seconds / n:12.2f}{per_index}")


def show_codes(rows: list[CodedSet]) -> None:
    print(
        f"\n{'index sets':12}{'bits/index':>12}{'of entropy':>12}{'encode ns':>12}{'decode ns':>12}"
        f"{'clustered: encode ns':>24}{'decode ns':>12}"
    )
    for row in rows:
        print(
            f"{row.density:<12.1%}{row.bits:12.2f}{row.bits / row.entropy:12.3f}{row.encode:12.1f}"
            f"{row.decode:12.1f}{row.encode_clustered:24.1f}{row.decode_clustered:12.1f}"
        )


def show_registered(rows: list[ChannelStats]) -> None:
    n = rows[0].num_elements
    print(f"\n{f'{n:,} float32':75}{'bytes':>10}{'lost':>8}{'compress ns':>13}{'decode ns':>11}")
    for row in rows:
        compress, decode = (
            1e9 * seconds / row.steps / n
            for seconds in (row.seconds_compress, row.seconds_decompress)
        )
        sent = row.bytes_out // row.steps
        print(f"{row.method:75}{sent:10}{row.relative_error:8.3f}{compress:13.2f}{decode:11.2f}")


def hold_limits(steps: dict[str, float], codes: list[CodedSet]) -> bool:
    """Print each limit and whether it holds; whether all do."""
    slowest = max((max(row[3:]) for row in codes), default=0.0)
    largest = max((row.bits / row.entropy for row in codes), default=0.0)
    checks = [
        (f"{name} takes", steps[name] / steps[reference], limit, f"of {reference}")
        for name, limit, reference in LIMITS
    ] + [
        ("coding or decoding an index takes", slowest, NS_PER_INDEX, "ns"),
        ("an index set takes", largest, OVER_ENTROPY, "of its entropy"),
    ]
    print()
    for what, number, limit, unit in checks:
        word = "MISSED" if number > limit else "holds"
        print(f"{word:7} {what} {number:.3f} {unit}, at most {limit:.3f} allowed")
    return all(number <= limit for _, number, limit, _ in checks)


def main(words: list[str]) -> int:
    options = parse(words)
    load(options.modules)
    torch.set_num_threads(1)
    all_steps = measure_steps(options.n, options.repeat)
    all_parts, indices = measure_parts(options.n, options.repeat)
    steps = {name: statistics.median(times) for name, times in all_steps.items()}
    parts = {name: statistics.median(times) for name, times in all_parts.items()}
    codes = measure_codes(options.n, options.repeat)
    show(steps, parts, options.n, indices)
    show_codes(codes)
    registered = measure_registered(min(options.n, REGISTERED_N), options.repeat)
    show_registered(registered)
    held = hold_limits(steps, codes)
    if options.json:
        report = {
            "n": options.n,
            "indices": indices,
            "seconds": all_steps | all_parts,
            "index_sets": [row._asdict() for row in codes],
            "registered": [asdict(row) for row in registered],
            "held": held,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if options.check and not held else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
