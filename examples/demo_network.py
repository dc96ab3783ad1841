"""What the demo trains, and what the kernel says was sent meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

import horovod.torch as hvd
import torch
from torch import nn

_COUNTERS = Path("/proc/net/dev")
_TRANSMITTED = 8  # column of the bytes sent, after the device's name


def small_cnn(channels: int, height: int) -> nn.Module:
    """Two convolutions and two linear layers, about 150,000 parameters."""
    first = nn.MaxPool2d(2) if height > 16 else nn.Identity()
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        first,
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(4),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def use_tcp() -> None:
    """Let Open MPI use TCP between ranks of one machine, too; call it before `hvd.init()`.

    The kernel counts what goes over TCP, and nothing of what goes through shared memory.
    horovodrun fixes this setting on mpirun's command line, so it can only be changed in here.
    """
    os.environ["OMPI_MCA_btl"] = "tcp,self"  # noqa: SIM112 - Open MPI's name


def loopback_bytes() -> int | None:
    """What the kernel has sent over the loopback device, by all processes, headers included.

    None where that says nothing: not Linux, ranks on several machines, or another transport.
    """
    if hvd.local_size() < hvd.size() or not _COUNTERS.is_file() or not hvd.mpi_enabled():
        return None
    for line in _COUNTERS.read_text().splitlines():
        device, _, numbers = line.partition(":")
        if device.strip() == "lo":
            return int(numbers.split()[_TRANSMITTED])
    return None


def idle_rate(seconds: float) -> float | None:
    """Bytes a second that Horovod's background threads exchange while nothing is asked of them."""
    hvd.barrier()
    begin, started = loopback_bytes(), time.perf_counter()
    time.sleep(seconds)
    end, elapsed = loopback_bytes(), time.perf_counter() - started
    hvd.barrier()
    return None if begin is None or end is None else (end - begin) / elapsed


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of the images x that are recognised."""
    predicted = torch.cat([model(part).argmax(1) for part in x.split(500)])
    return float((predicted == y).float().mean())
