"""Compressed updates: each rank's optimizer makes an update from its own gradients, and the updates
are averaged.

A step of H = 1 in the language of local updates: nothing is asked of the optimizer, because what is
compressed is the change that it made to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import horovod.torch as hvd
import torch

from ef_horovod.exchange.stats import ChannelStats
from ef_horovod.methods.base import Method
from ef_horovod.torch.buckets import Bucket
from ef_horovod.torch.hooks import require_free
from ef_horovod.torch.options import open_transport, refuse_unsupported
from ef_horovod.torch.parameters import name_parameters
from ef_horovod.torch.sync import SyncCheck
from ef_horovod.training.buckets import plan_buckets
from ef_horovod.training.driver import StepDriver
from ef_horovod.training.options import check_options
from ef_horovod.training.policy import (
    DensePolicy,
    require_method,
    small_or_vector,
    warn_of_surprises,
)
from ef_horovod.training.updates import ask_all, refuse_for_updates
from ef_horovod.transports.base import Transport

Named = list[tuple[str, torch.Tensor]]


class CompressedUpdates:
    """Wrap an optimizer so that its updates are averaged over all ranks, compressed.

    `step()` runs the optimizer on this rank's own gradients. The change of the parameters goes
    through error feedback, and all ranks apply the mean of what was sent. Any optimizer will do:
    AdamW, Muon, Lion, SGD with momentum. Schedules of the learning rate and clipping of gradients
    are for the inner optimizer and for `p.grad`, as on one rank; no `synchronize()` is needed.

    The optimizer's state differs between ranks, because each rank's gradients do: save and load
    `state_dict()` on every rank. Without compression it is dense training for SGD, with momentum
    too; for others it is the mean of the ranks' updates, and not the update of the mean gradient.

    If a gradient of any rank has a NaN or an infinity, all ranks leave the step out, and no state
    changes. The exchange starts after the backward pass and does not overlap with it. Memory: a
    copy of the parameters during `step()`.

    Args:
        optimizer: any torch optimizer that needs one gradient per step, not wrapped.
        named_parameters: `model.named_parameters()`; names must be equal on all ranks.
        compression: error-feedback method with its compressor, such as ErrorFeedback(OneBit()).
        dense: `dense(name, parameter)` says which parameters' updates stay uncompressed.
        exchange: as in `ef.DistributedOptimizer`, but no server.
        bucket_bytes: bytes of float32 per compressed bucket.
        seed: of random compressors.
        dense_steps: number of first steps that average uncompressed updates.
        process_set: Horovod process set to average over; default all ranks.
        check_sync: as in `ef.DistributedOptimizer`.
        timeout: seconds that a wait for other ranks may take; default $EF_HOROVOD_TIMEOUT or 300.

    Raises:
        UnsupportedError: the combination cannot work; the message names an alternative.
        ValueError: names are missing or doubled, or a number is out of range.

    Example:
        inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(inner, T_max=1000)
        optimizer = ef.CompressedUpdates(inner, model.named_parameters(),
                                         compression=ef.ErrorFeedback(ef.OneBit()))

    References:
        Karimireddy, Rebjock, Stich, Jaggi: Error Feedback Fixes SignSGD (ICML 2019), Algorithm 2,
        whose compressed quantity is the step; Douillard et al.: DiLoCo (2023), with one inner step
        and a mean as the outer one.
    """

    step_skipped = False  # whether the last step was left out on all ranks

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.Tensor]] | None,
        compression: Method,
        *,
        dense: DensePolicy = small_or_vector,
        exchange: str = "auto",
        bucket_bytes: int = 25 * 2**20,
        seed: int = 0,
        dense_steps: int = 0,
        process_set: Any = None,
        check_sync: bool = True,
        timeout: float | None = None,
    ) -> None:
        refuse_unsupported(optimizer, hvd.Average, 1.0, 0, None)
        check_options("CompressedUpdates", **locals())
        method = require_method(compression)
        refuse_for_updates(method, exchange)
        self.optimizer, self._engine = optimizer, None
        named, others = name_parameters(named_parameters, optimizer.param_groups)
        require_free({p: name for name, p in named})
        transport = open_transport(exchange, process_set, timeout, method)
        if transport is None:
            return
        self._engine = _Engine(
            [(name, p) for name, p in named if p.requires_grad],
            method,
            transport,
            dense=dense,
            exchange=exchange,
            bucket_bytes=bucket_bytes,
            seed=seed,
            dense_steps=dense_steps,
        )
        parameters = [p for _, p in named]
        self._in_sync = SyncCheck(parameters, transport, check_sync, others)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the inner optimizer."""
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch."""
        self.optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        """One step of the inner optimizer, and the exchange of what it changed; collective."""
        engine = self._engine
        if engine is None:
            self.optimizer.step()
            return
        engine.begin()
        self._in_sync.check()
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        self.step_skipped = not engine.agree(_are_finite(gradients))
        if not self.step_skipped:
            self.step_skipped = not engine.average(self.optimizer.step)

    def stats(self) -> list[ChannelStats]:
        """As of `ef.DistributedOptimizer`; empty with a single rank."""
        return self._engine.stats() if self._engine is not None else []

    @property
    def drivers(self) -> list[StepDriver[Any]]:
        """For `ef.TrainingLog`."""
        return [] if self._engine is None else [self._engine]

    @property
    def transport(self) -> Transport | None:
        """Transport to the other workers, with `rank` and `size`; None with a single rank."""
        return self._engine.transport if self._engine is not None else None

    def state_dict(self) -> dict[str, Any]:
        """This rank's optimizer state and error-feedback state; save one file per rank."""
        compression = {} if self._engine is None else self._engine.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "compression": compression}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict` of this rank.

        Raises:
            ValueError: it is something else, or the rank, number of ranks, method or model differs.
        """
        if set(state) != {"optimizer", "compression"}:
            raise ValueError(
                f"got a state with {sorted(map(str, state))[:4]}, expected 'compression' and "
                "'optimizer'; load the result of state_dict() of ef.CompressedUpdates"
            )
        if self._engine is not None:
            self._engine.load_state_dict(state["compression"])
        self.optimizer.load_state_dict(state["optimizer"])


class _Engine(StepDriver[Bucket]):
    """The buckets of updates."""

    def __init__(
        self, named: Named, method: Method, transport: Transport, *, dense: DensePolicy,
        exchange: str, bucket_bytes: int, seed: int, dense_steps: int,
    ) -> None:  # fmt: skip
        warn_of_surprises(named, method, dense, transport.rank)
        plans = plan_buckets(
            named,
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
        self._facts = [f"updates, exchange={exchange!r}, seed={seed}, dense_steps={dense_steps}"]
        self._compared = False

    def begin(self) -> None:
        """Before the first step: compare the ranks' options; collective."""
        if not self._compared:
            self._compare(self._facts)
            self._compared = True

    def agree(self, good: bool) -> bool:
        """Whether it is good on all ranks; if not, the step counts as left out. Collective."""
        all_good = ask_all(self.transport, good)()
        if not all_good:
            self.count_left_out()
        return all_good

    @torch.no_grad()
    def average(self, step: Callable[[], Any]) -> bool:
        """Take a step, and put the mean of all ranks' changes in its place.

        Returns:
            Whether all ranks' changes were finite; otherwise the parameters stay as they were.
        """
        before = {slot.parameter: slot.parameter.clone() for b in self.buckets for slot in b.slots}
        with torch.enable_grad():
            step()
        for bucket in self.buckets:
            for slot in bucket.slots:
                p, old = slot.parameter, before[slot.parameter]
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
        return directions is not None


def _are_finite(gradients: Iterable[torch.Tensor | None]) -> bool:
    """One wait for each device, not for each gradient."""
    good: dict[torch.device, list[torch.Tensor]] = {}
    for g in gradients:
        if g is not None:
            values = g.coalesce().values() if g.is_sparse else g
            good.setdefault(g.device, []).append(torch.isfinite(values).all())
    return all(bool(torch.stack(each).all()) for each in good.values())
