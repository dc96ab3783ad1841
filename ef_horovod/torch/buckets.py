"""Parameters that travel together: how they are packed, filled, sent and given back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ef_horovod.channel import Channel
from ef_horovod.compressors.identity import Identity
from ef_horovod.methods.base import Method
from ef_horovod.methods.no_feedback import NoFeedback
from ef_horovod.transports.base import Transport


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
        self.filled: dict[torch.Tensor, tuple[torch.Tensor | None, int]] = {}  # as of when
        self.started = False

    @classmethod
    def open(
        cls,
        name: str,
        slots: list[Slot],
        method: Method | None,
        transport: Transport,
        *,
        exchange: str,
        seed: int,
    ) -> Bucket:
        """A bucket with a channel of its own; without a method it travels uncompressed."""
        like = torch.empty(slots[-1].stop, device=slots[0].parameter.device)
        if method is None:
            method, exchange = NoFeedback(Identity()), "dense"
        return cls(Channel(name, like, method, transport, exchange=exchange, seed=seed), slots)

    def fill(self, slot: Slot, loss_scale: float) -> None:
        """Copy a parameter's gradient (zeros if it has none) into the bucket, unscaled."""
        target = self.channel.gradient[slot.start : slot.stop].view(slot.parameter.shape)
        gradient = slot.parameter.grad
        if gradient is None:
            target.zero_()
        elif loss_scale == 1.0:
            target.copy_(gradient.detach())
        else:
            target.copy_(gradient.detach()).div_(loss_scale)
        self.filled[slot.parameter] = _now(gradient)

    def start(self, step: int) -> None:
        """Send the bucket."""
        self.started = True
        self.channel.start(step)

    def deliver(self, direction: torch.Tensor | None, factor: float) -> None:
        """Give each parameter its part of direction * factor as gradient, NaN if there is none.

        Raises:
            RuntimeError: a gradient was changed after it had been taken; the change would be lost.
        """
        taken, self.filled, self.started = self.filled, {}, False
        for slot in self.slots:
            if not _same(taken[slot.parameter], _now(slot.parameter.grad)):
                raise RuntimeError(
                    f"the gradient of '{slot.name}' was changed between backward() and step(), "
                    "expected it as backward() left it, for it was on its way to other ranks; call "
                    "synchronize(), then change it, then step() inside skip_synchronize()"
                )
            if slot.parameter.grad is None:
                slot.parameter.grad = torch.zeros_like(slot.parameter)
            gradient = slot.parameter.grad
            if direction is None:
                gradient.fill_(float("nan"))
                continue
            part = direction[slot.start : slot.stop].view(slot.parameter.shape)
            gradient.copy_(part if factor == 1.0 else part * factor)  # scaled before it is rounded


def _now(gradient: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """A gradient and how often it was changed in place."""
    return gradient, 0 if gradient is None else gradient._version


def _same(before: tuple[torch.Tensor | None, int], after: tuple[torch.Tensor | None, int]) -> bool:
    return before[0] is after[0] and before[1] == after[1]
