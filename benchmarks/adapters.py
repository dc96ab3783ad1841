"""What the adapters themselves cost: from gradients to directions, without a network.

    python benchmarks/adapters.py              a ResNet-50's shapes and a large MLP's
    python benchmarks/adapters.py --check      exit code 1 if TensorFlow takes over 1.5 of torch

Both adapters do a whole step on equal gradients: pack them into buckets, compress, decode the
messages of two ranks, hand out the averages. In place of Horovod, the messages are doubled at
once. One thread; the adapters take turns, so that a slow moment of the machine meets each of them;
medians are shown.
"""

from __future__ import annotations

import os

# One thread: these are read when the libraries below are imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["NUMBA_NUM_THREADS"] = "1"
os.environ["TF_NUM_INTRAOP_THREADS"] = "1"
os.environ["TF_NUM_INTEROP_THREADS"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import torch

import ef_horovod as ef
from ef_horovod.tensorflow.engine import Engine
from ef_horovod.tensorflow.options import Options as EngineOptions
from ef_horovod.testing.echo import EchoTransport
from ef_horovod.testing.echo_tensorflow import EchoOps
from ef_horovod.torch.engine import Engine as TorchEngine
from ef_horovod.torch.options import Options as TorchOptions
from ef_horovod.training.policy import small_or_vector

LIMIT = 1.5
RANKS = 2
COMMON = {
    "average": True,
    "dense": small_or_vector,
    "exchange": "auto",
    "bucket_bytes": 25 * 2**20,
    "seed": 0,
    "dense_steps": 0,
    "sparse_as_dense": False,
}
METHODS = [
    ef.ErrorFeedback(ef.TopK(ratio=0.01)),
    ef.EF21(ef.TopK(ratio=0.01)),
    ef.ErrorFeedback(ef.OneBit()),
    ef.NoFeedback(ef.Identity()),
]
Step = Callable[[], Any]


def resnet_shapes() -> list[tuple[int, ...]]:
    """Of ResNet-50's 161 parameters, 25.6 million numbers."""
    shapes: list[tuple[int, ...]] = [(7, 7, 3, 64), (64,), (64,)]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers = [(1, width_in, width), (3, width, width), (1, width, 4 * width)]
            if block == 0:
                layers.append((1, width_in, 4 * width))
            for kernel, before, after in layers:
                shapes += [(kernel, kernel, before, after), (after,), (after,)]
            width_in = 4 * width
    return [*shapes, (2048, 1000), (1000,)]


MODELS = {
    "ResNet-50": resnet_shapes(),
    "MLP": [(784, 2048), (2048,), (2048, 2048), (2048,), (2048, 10), (10,)],
}


def torch_step(method: ef.Method, gradients: list[np.ndarray]) -> tuple[Step, Step]:
    """A step of the torch adapter, and what it gave."""
    parameters = [torch.nn.Parameter(torch.zeros(g.shape)) for g in gradients]
    named = [(f"p{i}", p) for i, p in enumerate(parameters)]
    options = TorchOptions(method=method, passes=1, overlap=False, check_sync=False, **COMMON)
    engine = TorchEngine(named, [], options, EchoTransport(RANKS))
    fresh = [torch.from_numpy(g) for g in gradients]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)

    def refill() -> None:
        for parameter, gradient in zip(parameters, fresh, strict=True):
            parameter.grad.copy_(gradient)

    def step() -> list[np.ndarray]:
        engine.finish()
        return [parameter.grad.numpy() for parameter in parameters]

    return step, refill


def tensorflow_step(method: ef.Method, gradients: list[np.ndarray]) -> tuple[Step, Step]:
    """A step of the TensorFlow adapter inside a tf.function."""
    variables = [tf.Variable(tf.zeros(g.shape)) for g in gradients]
    named = [(f"p{i}", v) for i, v in enumerate(variables)]
    options = EngineOptions(method=method, check_sync=False, discardable=False, **COMMON)
    engine = Engine(named, options, EchoOps(RANKS))
    fresh = [tf.constant(g) for g in gradients]
    reduce = tf.function(lambda *given: engine.reduce(given, tf.constant(1.0))[0])

    def step() -> list[np.ndarray]:
        return [np.asarray(direction) for direction in reduce(*fresh)]

    return step, lambda: None


ADAPTERS = {"torch": torch_step, "tensorflow": tensorflow_step}


def measure(
    shapes: list[tuple[int, ...]], method: ef.Method, repeat: int
) -> dict[str, list[float]]:
    """Seconds of each adapter's steps, in turns, after three rounds of warming up."""
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    contenders = {name: make(method, gradients) for name, make in ADAPTERS.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-3, repeat):
        for name, (step, refill) in contenders.items():
            refill()
            begin = time.perf_counter()
            step()
            if turn >= 0:
                times[name].append(time.perf_counter() - begin)
    return times


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=9, help="rounds to take medians of")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times here")
    parser.add_argument("--check", action="store_true", help="fail if the limit is missed")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    rows, missed = [], 0
    print(f"{'model':11}{'method':32}{'torch ms':>10}{'tensorflow ms':>15}{'ratio':>8}")
    for model, shapes in MODELS.items():
        for method in METHODS:
            times = measure(shapes, method, options.repeat)
            ours, reference = (statistics.median(times[n]) for n in ("tensorflow", "torch"))
            compressed = method.compressor != ef.Identity()
            missed += compressed and ours > LIMIT * reference
            name = f"{type(method).__name__}({type(method.compressor).__name__})"
            print(
                f"{model:11}{name:32}{1e3 * reference:10.1f}{1e3 * ours:15.1f}"
                f"{ours / reference:8.2f}",
                flush=True,
            )
            rows.append({"model": model, "method": repr(method), "seconds": times})
    word = "MISSED" if missed else "holds"
    print(f"\n{word}: TensorFlow's adapter takes at most {LIMIT} times torch's where it compresses")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
