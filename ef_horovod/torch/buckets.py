"""A bucket of torch parameters: how it is filled, sent and given back."""

from __future__ import annotations

from typing import TypeGuard

import torch

from ef_horovod.buckets import BucketPlan, Slot
from ef_horovod.channel import Channel
from ef_horovod.transports.base import Transport


class Bucket:
    """Parameters that travel together, and their channel.

    A gradient that is alone in its bucket and stays uncompressed is summed where it lies.
    """

    def __init__(self, channel: Channel, slots: list[Slot]) -> None:
        self.channel, self.slots = channel, slots
        self._alone = channel.exchange == "dense" and len(slots) == 1
        self._own = channel.gradient
        self.filled: dict[torch.Tensor, tuple[torch.Tensor | None, int]] = {}  # as of when
        self.started = False

    @classmethod
    def open(cls, plan: BucketPlan, transport: Transport, *, exchange: str, seed: int) -> Bucket:
        """A bucket with a channel of its own."""
        like = torch.empty(plan.length, device=plan.slots[0].parameter.device)
        return cls(plan.open(like, transport, exchange=exchange, seed=seed), plan.slots)

    def fill(self, slot: Slot, loss_scale: float) -> None:
        """Copy a parameter's gradient (zeros if it has none) into the bucket, unscaled."""
        gradient = slot.parameter.grad
        self.filled[slot.parameter] = state_of(gradient)
        if self._alone and loss_scale == 1.0 and _is_plain(gradient):
            # `data`, for sums in it are not what the user is told not to do in `release`.
            self.channel.gradient = gradient.data.view(-1)
            return
        target = self.channel.gradient[slot.start : slot.stop].view(slot.parameter.shape)
        if gradient is None:
            target.zero_()
        elif loss_scale == 1.0:
            target.copy_(gradient.detach())
        else:
            target.copy_(gradient.detach()).div_(loss_scale)

    def start(self, step: int) -> None:
        """Send the bucket."""
        self.started = True
        self.channel.start(step)

    def deliver(self, direction: torch.Tensor | None, factor: float) -> None:
        """Give each parameter its part of direction * factor as gradient, NaN if there is none."""
        for slot in self.slots:
            if slot.parameter.grad is None or slot.parameter.grad.is_sparse:
                slot.parameter.grad = torch.zeros_like(slot.parameter)
            gradient = slot.parameter.grad
            if direction is None:
                gradient.fill_(float("nan"))
                continue
            part = direction[slot.start : slot.stop].view(slot.parameter.shape)
            if factor != 1.0:
                part = part * factor  # scaled before it is rounded
            if part.data_ptr() != gradient.data_ptr():
                gradient.copy_(part)
        if self._alone:
            self.channel.gradient = self._own  # and not what the user may free

    def release(self) -> None:
        """Give up what `fill` has taken, before the first delivery of a step.

        Raises:
            RuntimeError: a gradient was changed after it had been taken; the change would be lost.
        """
        taken, self.filled, self.started = self.filled, {}, False
        for slot in self.slots:
            if not _same(taken[slot.parameter], state_of(slot.parameter.grad)):
                raise RuntimeError(
                    f"the gradient of '{slot.name}' was changed between backward() and step(), "
                    "expected it as backward() left it, for it was on its way to other ranks; call "
                    "synchronize(), then change it, then step() inside skip_synchronize()"
                )


def _is_plain(gradient: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Whether a gradient's memory is a float32 vector."""
    return gradient is not None and gradient.dtype == torch.float32 and gradient.is_contiguous()


def state_of(gradient: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """A gradient and how often it was changed in place."""
    return gradient, 0 if gradient is None else gradient._version


def _same(before: tuple[torch.Tensor | None, int], after: tuple[torch.Tensor | None, int]) -> bool:
    return before[0] is after[0] and before[1] == after[1]
