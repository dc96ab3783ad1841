"""Bytes on the loopback device, held against the library's count by both frameworks' programs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import report

import ef_horovod as ef

ELEMENTS, STEPS, WARM_UP = 4_000_000, 12, 3
METHODS = {
    "dense": ef.NoFeedback(ef.Identity()),
    "topk": ef.ErrorFeedback(ef.TopK(ratio=0.05)),
    "onebit": ef.ErrorFeedback(ef.OneBit()),
    "both ways": ef.DoubleSqueeze(ef.OneBit(), down=ef.OneBit()),
    "randomk": ef.ErrorFeedback(ef.RandomK(ratio=0.05)),
}
EXCHANGES = {"both ways": "double_pass"}  # of the others, "auto"


def loopback_bytes() -> int:
    """Bytes transmitted over the loopback device since boot (Linux)."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise RuntimeError("no loopback device in /proc/net/dev")


def compare(hvd: Any, train: Callable[[int], None], stats: Callable[[], list[Any]]) -> None:
    """Report both counts of some steps, after a warm-up.

    Args:
        hvd: horovod.torch or horovod.tensorflow.
        train: takes so many steps.
        stats: of what is trained with.
    """

    def measured(action: Callable[[], Any]) -> tuple[int, float]:
        """Bytes that all ranks put on the device during an action, and its seconds."""
        hvd.allgather_object(0)
        before, begin = loopback_bytes(), time.perf_counter()
        action()
        hvd.allgather_object(0)
        return loopback_bytes() - before, time.perf_counter() - begin

    train(WARM_UP)
    counted = stats()[-1].bytes_out
    control, idle_seconds = measured(lambda: time.sleep(2))
    kernel, seconds = measured(lambda: train(STEPS))
    report(
        hvd.rank(),
        {
            "library": stats()[-1].bytes_out - counted,
            "kernel": kernel,
            "control": control / idle_seconds * seconds,
            "steps": STEPS,
            "elements": ELEMENTS,
        },
    )
