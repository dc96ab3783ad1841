"""A bucket of torch parameters: filling, sending, delivering."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeGuard

import torch

from ef_horovod.exchange.channel import Channel
from ef_horovod.methods.base import Method
from ef_horovod.training.buckets import BucketPlan, Slot, plan_buckets
from ef_horovod.training.choice import Choice
from ef_horovod.training.policy import DensePolicy
from ef_horovod.transports.base import Transport

_SAMPLE = 32  # sampled entries per gradient, to detect changes


class Bucket:
    """Parameters that are sent together, and their channel.

    A single uncompressed gradient is summed in place, without a copy.
    """

    def __init__(self, channel: Channel, slots: list[Slot]) -> None:
        self.channel, self.slots = channel, slots
        self._alone = not channel.exchange.compresses and len(slots) == 1
        self._own = channel.gradient
        self.filled: dict[torch.Tensor, Taken] = {}
        self.started = False

    @classmethod
    def open(cls, plan: BucketPlan, choice: Choice, transport: Transport, *, seed: int) -> Bucket:
        """A bucket that is sent by the given choice."""
        like = torch.empty(plan.length, device=plan.slots[0].parameter.device)
        return cls(choice.open(plan.name, like, transport, seed=seed), plan.slots)

    def fill(self, slot: Slot, loss_scale: float, *, in_place: bool = True) -> None:
        """Copy a parameter's gradient (zeros if it has none) into the bucket, unscaled.

        Args:
            slot: of the parameter.
            loss_scale: factor that the gradient contains.
            in_place: whether the gradient may be summed in place.
        """
        gradient = slot.parameter.grad
        if self._alone and in_place and loss_scale == 1.0 and _is_plain(gradient):
            self.filled[slot.parameter] = Taken.of(gradient, sampled=False)
            # `.data`: the in-place allreduce must not count as a change by the user.
            self.channel.gradient = gradient.data.view(-1)
            return
        if self._alone:
            self.channel.gradient = self._own  # drop the gradient of an earlier step
        self.filled[slot.parameter] = Taken.of(gradient)
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
        """Write `direction` * factor into the parameters' gradients; NaN if it is None."""
        for slot in self.slots:
            if slot.parameter.grad is None or slot.parameter.grad.is_sparse:
                slot.parameter.grad = torch.zeros_like(slot.parameter)
            gradient = slot.parameter.grad
            if direction is None:
                gradient.fill_(float("nan"))
                continue
            part = direction[slot.start : slot.stop].view(slot.parameter.shape)
            if factor != 1.0:
                part = part * factor  # scale before rounding
            if part.data_ptr() != gradient.data_ptr():
                gradient.copy_(part)
        if self._alone:
            self.channel.gradient = self._own  # the user may free the gradient

    def release(self) -> None:
        """Forget the filled gradients before the next step."""
        self.filled, self.started = {}, False


def open_buckets(
    named: Sequence[tuple[str, torch.Tensor]],
    method: Method,
    transport: Transport,
    *,
    dense: DensePolicy,
    exchange: str,
    bucket_bytes: int,
    seed: int,
    dense_steps: int,
) -> list[Bucket]:
    """The buckets of parameters; see `plan_buckets` and `Channel` for the arguments.

    If nothing is compressed, large parameters have a bucket each, which avoids copies. Small ones
    always share one allreduce.
    """
    plans = plan_buckets(
        named,
        method,
        dense=dense,
        bucket_bytes=bucket_bytes,
        device_of=lambda parameter: parameter.device,
        dense_steps=dense_steps,
    )
    buckets = []
    for plan in plans:
        choice = plan.decide(transport, exchange)
        whole = plan.method is None or choice.exchange.compresses
        for one in [plan] if whole else plan.apart():
            buckets.append(Bucket.open(one, choice, transport, seed=seed))
    return buckets


def in_order(buckets: Sequence[Bucket]) -> list[Bucket]:
    """In the order of their starts: small parameters share a bucket that is full last."""
    return sorted(buckets, key=lambda bucket: bucket.channel.name.startswith("dense"))


class Taken(NamedTuple):
    """Snapshot of a gradient at the time it was copied into a bucket."""

    gradient: torch.Tensor | None
    version: int  # torch's count of in-place changes
    sample: torch.Tensor | None  # some entries, because not all changes raise the version

    @classmethod
    def of(cls, gradient: torch.Tensor | None, *, sampled: bool = True) -> Taken:
        """Take a snapshot of the gradient."""
        if gradient is None:
            return cls(None, 0, None)
        dense = sampled and not gradient.is_sparse
        return cls(gradient, gradient._version, _sample_of(gradient).clone() if dense else None)

    def is_current(self, gradient: torch.Tensor | None) -> bool:
        """Whether it is the same tensor in the same version."""
        if gradient is None or self.gradient is None:
            return self.gradient is gradient
        if gradient.is_sparse and gradient.dtype == torch.float16:
            return True  # a GradScaler replaces these tensors
        if gradient._is_view():
            return self.gradient is gradient  # views share one version; rely on samples
        return self.gradient is gradient and gradient._version == self.version

    def is_unchanged(self, now: torch.Tensor) -> bool:
        """Whether tensor, version and sample are the same; needs a sample."""
        assert self.sample is not None
        return self.is_current(now) and _are_same(self.sample, _sample_of(now).contiguous())


def require_untouched(buckets: Iterable[Bucket], factor: float | None = None) -> None:
    """Raise if a gradient was changed after it was taken, because the change would be lost.

    Args:
        buckets: their taken gradients are checked.
        factor: by which a GradScaler has multiplied all of them since, if any.

    Raises:
        RuntimeError: names the parameter.
    """
    name = _changed_gradient(buckets, factor)
    if name:
        raise RuntimeError(
            f"the gradient of '{name}' was changed between backward() and step(), "
            "expected it as backward() left it: it was on its way to other ranks; call "
            "synchronize(), then change it (clip, scaler.unscale_), then step() inside "
            "skip_synchronize() (with a GradScaler pass grad_scaler=scaler, too), or "
            "discard() to leave the step out"
        )


def _changed_gradient(buckets: Iterable[Bucket], factor: float | None) -> str:
    """Name of a parameter whose gradient was replaced or changed after it was taken, or "".

    Some changes do not raise a tensor's version (`p.grad.data`, a GradScaler). Samples detect them.
    """
    samples: dict[tuple[torch.device, torch.dtype], list[_Sample]] = {}
    for bucket in buckets:
        for slot in bucket.slots:
            if slot.parameter not in bucket.filled:
                continue
            taken, now = bucket.filled[slot.parameter], slot.parameter.grad
            if not taken.is_current(now):
                return slot.name
            if taken.sample is not None and now is not None:
                sample = _Sample(slot.name, taken.sample, _sample_of(now))
                samples.setdefault((now.device, now.dtype), []).append(sample)
    for alike in samples.values():  # one comparison for all: it synchronizes with the GPU
        before = torch.cat([sample.before for sample in alike])
        if not _are_same(before, torch.cat([sample.now for sample in alike]), factor):
            return next(
                s.name for s in alike if not _are_same(s.before, s.now.contiguous(), factor)
            )
    return ""


class _Sample(NamedTuple):
    name: str
    before: torch.Tensor
    now: torch.Tensor


def _are_same(before: torch.Tensor, now: torch.Tensor, factor: float | None = None) -> bool:
    """Whether `now` is bitwise `before`, or about `before` * factor (1: NaNs may differ)."""
    if factor is None:
        return torch.equal(before.view(torch.uint8), now.view(torch.uint8))
    tolerance = 0.0 if factor == 1.0 else 1e-2
    return torch.allclose(before * factor, now, rtol=tolerance, atol=0.0, equal_nan=True)


def _sample_of(gradient: torch.Tensor) -> torch.Tensor:
    """At most 32 evenly spaced entries of a gradient; a view where possible."""
    gradient = gradient.detach()
    step = max(1, -(-gradient.numel() // _SAMPLE))
    if gradient.is_contiguous():
        return gradient.as_strided((-(-gradient.numel() // step),), (step,))
    # In memory order, dense tensors need no copy.
    order = sorted(range(gradient.dim()), key=gradient.stride, reverse=True)
    return gradient.permute(order).reshape(-1)[::step]


def _is_plain(gradient: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Whether a gradient is contiguous float32."""
    return gradient is not None and gradient.dtype == torch.float32 and gradient.is_contiguous()
