"""What the kernel says was sent: the counter of the loopback device."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

_COUNTERS = Path("/proc/net/dev")
_TRANSMITTED = 8  # column of the bytes sent, after the device's name


def use_tcp() -> None:
    """Let Open MPI use TCP between ranks of one machine, too; call it before `hvd.init()`.

    The kernel counts what goes over TCP, and nothing of what goes through shared memory.
    horovodrun fixes this setting on mpirun's command line, so it can only be changed in here.
    """
    os.environ["OMPI_MCA_btl"] = "tcp,self"  # noqa: SIM112 - Open MPI's name


def loopback_bytes(hvd: Any) -> int | None:
    """What the kernel has sent over the loopback device, by all processes, headers included.

    None where that says nothing: not Linux, ranks on several machines, or another transport.

    Args:
        hvd: the Horovod module of the framework.
    """
    if hvd.local_size() < hvd.size() or not _COUNTERS.is_file() or not hvd.mpi_enabled():
        return None
    for line in _COUNTERS.read_text().splitlines():
        device, _, numbers = line.partition(":")
        if device.strip() == "lo":
            return int(numbers.split()[_TRANSMITTED])
    return None


def wait_for_all(hvd: Any) -> None:
    """Until all ranks are here; horovod.tensorflow has no barrier of its own."""
    hvd.allgather_object(None, name="all_are_here")


def idle_rate(hvd: Any, seconds: float) -> float | None:
    """Bytes a second that Horovod's background threads exchange while nothing is asked of them."""
    wait_for_all(hvd)
    begin, started = loopback_bytes(hvd), time.perf_counter()
    time.sleep(seconds)
    end, elapsed = loopback_bytes(hvd), time.perf_counter() - started
    wait_for_all(hvd)
    return None if begin is None or end is None else (end - begin) / elapsed
