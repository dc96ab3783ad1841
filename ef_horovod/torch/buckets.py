"""Parameters that travel together: how they are packed, filled, sent and given back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ef_horovod.channel import Channel


class Slot(NamedTuple):
    """Where a parameter's gradient lies in its bucket."""

    name: str
    parameter: torch.Tensor
    start: int
    stop: int


def plan_buckets(
    parameters: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int
) -> list[list[Slot]]:
    """Pack parameters into buckets, last registered first, as backward produces their gradients.

    Args:
        parameters: (name, parameter) in the order of registration.
        bucket_bytes: of float32 in a bucket; a larger parameter has a bucket of its own.
    """
    buckets: list[list[Slot]] = []
    for name, parameter in reversed(list(parameters)):
        size = parameter.numel()
        last = buckets[-1] if buckets else None
        if (
            last is None
            or 4 * (last[-1].stop + size) > bucket_bytes
            or last[-1].parameter.device != parameter.device
        ):
            last = []
            buckets.append(last)
        start = last[-1].stop if last else 0
        last.append(Slot(name, parameter, start, start + size))
    return buckets


class Bucket:
    """Parameters that travel together, and their channel."""

    def __init__(self, channel: Channel, slots: list[Slot]) -> None:
        self.channel, self.slots = channel, slots
        self.filled: set[torch.Tensor] = set()
        self.started = False

    def fill(self, slot: Slot, loss_scale: float) -> None:
        """Copy a parameter's gradient (zeros if it has none) into the bucket, unscaled."""
        target = self.channel.gradient[slot.start : slot.stop].view(slot.parameter.shape)
        gradient = slot.parameter.grad
        if gradient is None:
            target.zero_()
        elif loss_scale == 1.0:
            target.copy_(gradient)
        else:
            target.copy_(gradient).div_(loss_scale)
        self.filled.add(slot.parameter)

    def start(self, step: int) -> None:
        """Send the bucket."""
        self.started = True
        self.channel.start(step)

    def deliver(self, direction: torch.Tensor | None, factor: float) -> None:
        """Give each parameter its part of direction * factor as gradient, NaN if there is none."""
        for slot in self.slots:
            if slot.parameter.grad is None:
                slot.parameter.grad = torch.zeros_like(slot.parameter)
            gradient = slot.parameter.grad
            if direction is None:
                gradient.fill_(float("nan"))
                continue
            gradient.copy_(direction[slot.start : slot.stop].view(slot.parameter.shape))
            if factor != 1.0:
                gradient.mul_(factor)
        self.filled.clear()
        self.started = False
