"""The buckets of `ef.CompressedUpdates`: a rank's own steps, and the mean of all ranks' changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ef_horovod.methods.base import Method
from ef_horovod.torch.buckets import Bucket
from ef_horovod.torch.hooks import Owned
from ef_horovod.torch.parameters import require_unchanged
from ef_horovod.torch.sync import SyncCheck
from ef_horovod.training.buckets import plan_buckets
from ef_horovod.training.driver import StepDriver
from ef_horovod.training.policy import DensePolicy, warn_of_surprises
from ef_horovod.training.updates import (
    ask_all,
    compare_since,
    count_local_steps,
    local_part,
    require_exchanged,
)
from ef_horovod.transports.base import Transport

Named = list[tuple[str, torch.Tensor]]


class UpdateEngine(StepDriver[Bucket]):
    """Takes steps on this rank, and averages their changes over ranks, compressed.

    Args:
        named: the optimizer's parameters with their names, equal on all ranks.
        in_sync: compares them.
        local_steps: steps per exchange.

    The other arguments are those of `ef.CompressedUpdates`.
    """

    compressed = "updates"

    def __init__(
        self, named: Named, method: Method, transport: Transport, in_sync: SyncCheck, *,
        dense: DensePolicy, exchange: str, bucket_bytes: int, seed: int, dense_steps: int,
        local_steps: int, sparse_as_dense: bool,
    ) -> None:  # fmt: skip
        trained = [(name, p) for name, p in named if p.requires_grad]
        self._frozen = [(name, p) for name, p in named if not p.requires_grad]
        warn_of_surprises(trained, method, dense, transport.rank)
        plans = plan_buckets(
            trained,
            method,
            dense=dense,
            bucket_bytes=bucket_bytes,
            device_of=lambda p: p.device,
            dense_steps=dense_steps,
        )
        super().__init__(
            method,
            transport,
            [
                Bucket.open(plan, plan.decide(transport, exchange), transport, seed=seed)
                for plan in plans
            ],
        )
        self._options = f"updates, exchange={exchange!r}, seed={seed}, dense_steps={dense_steps}"
        self.local_steps = local_steps
        self.since = 0  # steps since the last exchange
        self._left_out = 0  # of these, by this rank alone
        self._start: dict[torch.Tensor, torch.Tensor] = {}  # the parameters after it
        self._committed = 0  # steps in all exchanges so far
        self._compared = False
        self._in_sync, self._sparse_as_dense = in_sync, sparse_as_dense
        self._owned = Owned({p: name for name, p in trained})

    def close(self) -> None:
        """Let another optimizer have the parameters."""
        self._owned.remove()

    def begin(self) -> None:
        """Compare the ranks' options before the first step, and parameters if due; collective."""
        if not self._compared:
            local = f"local_steps={self.local_steps} ({self.since} since an exchange)"
            self._compare([f"{self._options}, {local}"])
            self._compared = True
        require_unchanged(self._frozen, [(slot.name, slot.parameter) for slot in self._slots()])
        if not self.since:
            self._in_sync.check()

    @torch.no_grad()
    def average(
        self, groups: Sequence[dict[str, Any]], step: Callable[[], Any], *, overflow: bool = False
    ) -> tuple[bool, Any]:
        """Take a step. If an exchange is due, put the mean of all ranks' changes in its place.

        Args:
            groups: the optimizer's parameters, with this rank's gradients.
            step: changes the parameters.
            overflow: whether a GradScaler found a gradient of this rank that was not finite.

        Returns:
            Whether the step was taken, and what `step` returned. It is left out if a gradient is
            not finite: on any rank if each step has an exchange, else on this rank.
        """
        good = not overflow and _are_finite(p.grad for group in groups for p in group["params"])
        if self.local_steps == 1:
            good = ask_all(self.transport, good)()
        if not good:
            self.count_left_out()
            if self.local_steps == 1:
                return False, None
            self._left_out += 1
        if not self.since:
            self._start = {slot.parameter: slot.parameter.clone() for slot in self._slots()}
        stepped = _taken(groups, step, self._sparse_as_dense) if good else None
        self.since += 1
        due = self.since >= self.local_steps
        return (self.exchange() if due else True) and good, stepped

    @torch.inference_mode(False)  # the state must not become that of an inference
    @torch.no_grad()
    def exchange(self) -> bool:
        """Put the mean of all ranks' changes since the last exchange in their place; collective.

        Returns:
            Whether all changes were finite. If not, the parameters are those of the last exchange.
        """
        if self.local_steps > 1:
            compare_since(self.transport, self.since)()
        before = [(channel.counters, replace(channel.counters)) for channel in self._channels()]
        for bucket in self.buckets:
            for slot in bucket.slots:
                p, old = slot.parameter, self._start[slot.parameter]
                target = bucket.channel.gradient[slot.start : slot.stop].view(p.shape)
                torch.sub(p.to(target.dtype), old.to(target.dtype), out=target)
                p.copy_(old)
            bucket.start(self.step)
        directions = self._finish()
        for bucket, direction in zip(self.buckets, directions or (), strict=False):
            for slot in bucket.slots:
                slot.parameter.add_(direction[slot.start : slot.stop].view(slot.parameter.shape))
        for bucket in self.buckets:
            bucket.release()
        for counters, earlier in before:
            count_local_steps(counters, earlier, self.since, self._left_out)
        self._committed += self.since if directions is not None else 0
        self.since, self._left_out, self._start = 0, 0, {}
        return directions is not None

    def steps_taken(self) -> int:
        """Of the optimizer, those before a loaded state included."""
        return self._committed + self.since

    def require_exchanged(self, what: str) -> None:
        """Raise between exchanges, when the ranks' parameters differ."""
        require_exchanged(what, self.since, self.local_steps)

    def state_dict(self) -> dict[str, Any]:
        """See `StepDriver.state_dict`; between exchanges with the parameters of the last one."""
        slots = self._slots() if self.since else []
        start = {slot.name: self._start[slot.parameter].clone() for slot in slots}
        local = {"committed": self._committed, "since": self.since, "start": start}
        return super().state_dict() | {"local": local}

    def describe_merged(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """See `StepDriver.describe_merged`."""
        return super().describe_merged(parameters) | {"local": {"committed": self._committed}}

    def merged_state_dict(self) -> dict[str, Any]:
        """See `StepDriver.merged_state_dict`."""
        self.require_exchanged("the state for any number of ranks")
        return super().merged_state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `StepDriver.load_state_dict`."""
        self._require_own(state)
        shapes = {slot.name: tuple(slot.parameter.shape) for slot in self._slots()}
        local = local_part(state, shapes, self.local_steps)
        super().load_state_dict(state)
        self._committed = self.step if local.committed is None else local.committed
        self.since, self._left_out = local.since, 0
        slots = self._slots() if self.since else []
        self._start = {slot.parameter: local.start[slot.name].clone() for slot in slots}


def _taken(groups: Sequence[dict[str, Any]], step: Callable[[], Any], dense: bool) -> Any:
    """The result of a step, with sparse gradients made dense before if wanted."""
    if dense:
        _make_dense(groups)
    with torch.enable_grad():
        return step()


def _make_dense(groups: Iterable[dict[str, Any]]) -> None:
    for group in groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.to_dense()


def _are_finite(gradients: Iterable[torch.Tensor | None]) -> bool:
    """One wait for each device, not for each gradient."""
    good: dict[torch.device, list[torch.Tensor]] = {}
    for g in gradients:
        if g is not None:
            values = g.coalesce().values() if g.is_sparse else g
            good.setdefault(g.device, []).append(torch.isfinite(values).all())
    return all(bool(torch.stack(each).all()) for each in good.values())
