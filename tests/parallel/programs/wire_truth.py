"""Bytes by the library's count and by the kernel's loopback counter, for one way of reducing."""

from __future__ import annotations

import time
from pathlib import Path

import horovod.torch as hvd
import torch
from common import ARGUMENTS, report

import ef_horovod.torch as ef

ELEMENTS, STEPS, WARM_UP = 4_000_000, 12, 3
METHODS = {
    "dense": ef.NoFeedback(ef.Identity()),
    "topk": ef.ErrorFeedback(ef.TopK(ratio=0.05)),
    "onebit": ef.ErrorFeedback(ef.OneBit()),
    "randomk": ef.ErrorFeedback(ef.RandomK(ratio=0.05)),
}


def loopback_bytes() -> int:
    """Bytes transmitted over the loopback device since boot (Linux)."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise RuntimeError("no loopback device in /proc/net/dev")


def measured(action) -> tuple[int, float]:
    """Bytes that all ranks put on the loopback device during an action, and its seconds."""
    hvd.barrier()
    before, begin = loopback_bytes(), time.perf_counter()
    action()
    hvd.barrier()
    return loopback_bytes() - before, time.perf_counter() - begin


def main() -> None:
    hvd.init()
    parameter = torch.nn.Parameter(torch.zeros(ELEMENTS))
    optimizer = ef.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=0.1),
        [("weight", parameter)],
        compression=METHODS[ARGUMENTS[0]],
        dense=lambda name, parameter: False,
        bucket_bytes=4 * ELEMENTS,
    )
    gradient = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(hvd.rank()))

    def train(steps: int) -> None:
        for _ in range(steps):
            parameter.grad = None
            (parameter * gradient).sum().backward()
            optimizer.step()

    train(WARM_UP)
    counted = optimizer.stats()[-1].bytes_out
    control, idle_seconds = measured(lambda: time.sleep(2))
    kernel, seconds = measured(lambda: train(STEPS))
    report(
        hvd.rank(),
        {
            "library": optimizer.stats()[-1].bytes_out - counted,
            "kernel": kernel,
            "control": control / idle_seconds * seconds,
            "steps": STEPS,
            "elements": ELEMENTS,
        },
    )


main()
