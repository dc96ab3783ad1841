"""Bytes on a network device, held against the library's count by several programs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ef_horovod as ef

ELEMENTS, STEPS, WARM_UP = 4_000_000, 12, 3
METHODS = {
    "dense": ef.NoFeedback(ef.Identity()),
    "topk": ef.ErrorFeedback(ef.TopK(ratio=0.05)),
    "onebit": ef.ErrorFeedback(ef.OneBit()),
    "both ways": ef.DoubleSqueeze(ef.OneBit(), server_compressor=ef.OneBit()),
    "randomk": ef.ErrorFeedback(ef.RandomK(ratio=0.05)),
}
EXCHANGES = {"both ways": "double_pass"}  # of the others, "auto"


DEVICE = os.environ.get("WIRE_DEVICE", "lo")  # of which all packets are large
HEADERS = {"lo": 0, "eth0": 66}[DEVICE]  # bytes of a packet that are not data: Ethernet, IP, TCP


def device_bytes() -> int:
    """Bytes that the device has transmitted so far, without headers (Linux)."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == DEVICE:
            sent, packets = (int(number) for number in counters.split()[8:10])
            return sent - HEADERS * packets
    raise RuntimeError(f"no device {DEVICE} in /proc/net/dev")


def compare(
    meet: Callable[[], Any], train: Callable[[int], None], counted: Callable[[], int]
) -> dict[str, float]:
    """Both counts of some steps, after a warm-up.

    Args:
        meet: returns when all ranks have called it.
        train: takes so many steps.
        counted: bytes by the library so far.
    """

    def measured(action: Callable[[], Any]) -> tuple[int, float]:
        """Bytes that all ranks put on the device during an action, and its seconds."""
        meet()
        before, begin = device_bytes(), time.perf_counter()
        action()
        meet()
        return device_bytes() - before, time.perf_counter() - begin

    train(WARM_UP)
    before = counted()
    control, idle_seconds = measured(lambda: time.sleep(2))
    kernel, seconds = measured(lambda: train(STEPS))
    return {
        "library": counted() - before,
        "library_since_start": counted(),
        "kernel": kernel,
        "control": control / idle_seconds * seconds,
        "steps": STEPS,
        "elements": ELEMENTS,
    }


def compare_horovod(
    hvd: Any, train: Callable[[int], None], stats: Callable[[], list[Any]]
) -> dict[str, float]:
    """The same for what Horovod sends: `hvd` is horovod.torch or horovod.tensorflow."""
    return compare(lambda: hvd.allgather_object(0), train, lambda: stats()[-1].bytes_out)
