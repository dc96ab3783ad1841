"""Compressed updates: each rank's optimizer makes an update from its own gradients, and the updates
are averaged.

A step of H = 1 in the language of local updates: nothing is asked of the optimizer, because what is
compressed is the change that it made to the parameters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.torch import wrapping
from ef_horovod.torch.buckets import Bucket
from ef_horovod.torch.hooks import Owned
from ef_horovod.torch.loss_scale import lower_scale, take_call, unscale
from ef_horovod.torch.options import averages, open_transport, refuse_unsupported
from ef_horovod.torch.parameters import name_parameters, require_unchanged
from ef_horovod.torch.sync import SyncCheck
from ef_horovod.torch.wrapped import _Wrapped
from ef_horovod.training.buckets import plan_buckets
from ef_horovod.training.driver import StepDriver
from ef_horovod.training.options import check_options
from ef_horovod.training.policy import (
    DensePolicy,
    refuse_elastic,
    require_method,
    small_or_vector,
    warn_of_surprises,
)
from ef_horovod.training.updates import ask_all, refuse_for_updates
from ef_horovod.transports.base import Transport

if TYPE_CHECKING:
    from ef_horovod.torch.typed import UpdatingOptimizer

Named = list[tuple[str, torch.Tensor]]


def CompressedUpdates(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None,
    compression: Method,
    backward_passes_per_step: int = 1,
    op: Any = "average",
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: Any = None,
    *,
    dense: DensePolicy = small_or_vector,
    exchange: str = "auto",
    bucket_bytes: int = 25 * 2**20,
    seed: int = 0,
    dense_steps: int = 0,
    check_sync: bool = True,
    timeout: float | None = None,
    transport: Any = None,
) -> UpdatingOptimizer:
    """Wrap an optimizer so that its updates are averaged over all ranks, compressed.

    `step()` runs the optimizer on this rank's own gradients. The change of the parameters goes
    through error feedback, and all ranks apply the mean of what was sent. Any optimizer will do:
    AdamW, Muon, Lion, SGD with momentum.

    The first ten arguments are those of `hvd.DistributedOptimizer`. The result is an instance of
    the wrapped optimizer's class with the same state and parameter groups. So learning rate
    schedulers, step hooks and `step(closure)` work as with the plain optimizer. The methods that
    are added have the names of those of `ef.DistributedOptimizer`. With a single rank it is the
    plain optimizer.

    `p.grad` stays this rank's own gradient. Clip it before `step()`; `synchronize()` and
    `skip_synchronize()` do nothing.

    The optimizer's state differs between ranks, because each rank's gradients do: save and load
    `state_dict()` and `compression_state_dict()` on every rank. Without compression it is dense
    training for SGD, with momentum too; for others it is the mean of the ranks' updates, and not
    the update of the mean gradient.

    If a gradient of any rank has a NaN or an infinity, all ranks leave the step out: no state
    changes, no step hook runs, `step_skipped` is True, and a `torch.amp.GradScaler` lowers its
    scale on all ranks. The exchange starts after the backward pass and does not overlap with it.
    Memory: a copy of the parameters during `step()`.

    Args:
        optimizer: any torch optimizer that needs one gradient per step, not wrapped.
        named_parameters: `model.named_parameters()`; names must be equal on all ranks. None numbers
            the parameters.
        compression: error-feedback method with its compressor, such as ErrorFeedback(OneBit()).
        backward_passes_per_step: micro-batches whose gradients are summed before `step()`. Nothing
            is sent before, so the number only has to be valid.
        op: "average", or `hvd.Average`.
        gradient_predivide_factor: must be 1.0.
        num_groups, groups: not supported; buckets replace them.
        sparse_as_dense: whether the optimizer gets sparse gradients as dense ones. Its updates are
            dense and compressed in any case.
        process_set: Horovod process set to average over; default all ranks.
        dense: `dense(name, parameter)` says which parameters' updates stay uncompressed.
        exchange: as in `ef.DistributedOptimizer`, but no server.
        bucket_bytes: bytes of float32 per compressed bucket.
        seed: of random compressors.
        dense_steps: number of first steps that average uncompressed updates.
        check_sync: as in `ef.DistributedOptimizer`.
        timeout: seconds that a wait for other ranks may take; default $EF_HOROVOD_TIMEOUT or 300.
        transport: as in `ef.DistributedOptimizer`.

    Raises:
        UnsupportedError: the combination cannot work; the message names an alternative.
        ValueError: names are missing or doubled, or a number is out of range.

    Example:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer = ef.CompressedUpdates(optimizer, model.named_parameters(),
                                         compression=ef.ErrorFeedback(ef.OneBit()))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)

    References:
        Karimireddy, Rebjock, Stich, Jaggi: Error Feedback Fixes SignSGD (ICML 2019), Algorithm 2,
        whose compressed quantity is the step; Douillard et al.: DiLoCo (2023), with one inner step
        and a mean as the outer one.
    """
    _require_average(op)
    refuse_elastic()
    refuse_unsupported(optimizer, op, gradient_predivide_factor, num_groups, groups)
    check_options("CompressedUpdates", **locals() | {"transport": None})  # checked when opened
    method = require_method(compression)
    refuse_for_updates(method, exchange)
    named, others = name_parameters(named_parameters, optimizer.param_groups)
    wrapped = wrapping.wrap(optimizer, _Updating)
    transport = open_transport(exchange, process_set, timeout, method, transport)
    wrapped.outside = process_set is not None and not process_set.included()
    if transport is not None:
        wrapped._engine = _Engine(
            named,
            method,
            transport,
            SyncCheck([p for _, p in named], transport, check_sync, others),
            dense=dense,
            exchange=exchange,
            bucket_bytes=bucket_bytes,
            seed=seed,
            dense_steps=dense_steps,
            sparse_as_dense=sparse_as_dense,
        )
    return wrapped


class _Updating(_Wrapped):
    """What an optimizer whose updates are averaged can do besides."""

    _engine: _Engine | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimizer, and the exchange of what it changed; collective.

        The closure is called once, before the step, with a single rank as the optimizer does it.
        Step hooks run where they would: those after a step see the averaged parameters.
        """
        engine = self._engine
        if engine is None:
            return self._base.step(self, *([] if closure is None else [closure]))  # type: ignore[call-overload]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        engine.begin()
        call = take_call(self)
        if call is not None:
            unscale(self, call)
        with _hooks_after(self) as run_hooks:
            good, stepped = engine.average(self.param_groups, lambda: self._base.step(self))  # type: ignore[call-overload]
        self.step_skipped = not good
        if good:
            run_hooks()
        elif call is not None:
            lower_scale(self, call)
        return stepped if closure is None else loss

    def synchronize(self) -> None:
        """Does nothing, so that scripts for Horovod run: `p.grad` stays this rank's own gradient.

        To clip, clip `p.grad` before `step()`, here or without this call. Do not leave a step out
        because of the norm of `p.grad`: it differs between ranks, and all of them take each step.
        """

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Changes nothing about the `step()` inside, as `synchronize()` does nothing."""
        yield

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Changes nothing: gradients are summed until `step()`, however many they are."""
        check_options("the optimizer", backward_passes_per_step=passes)

    def discard(self) -> None:
        """Clear gradients, to leave this step out; call it on all ranks in place of `step()`."""
        self._base.zero_grad(self)  # type: ignore[arg-type]


# Hooks run in the base's step. `hooked` keeps torch from running them in ours again.
_Updating.step.hooked = True  # type: ignore[attr-defined]


class _Engine(StepDriver[Bucket]):
    """The buckets of updates."""

    compressed = "updates"

    def __init__(
        self, named: Named, method: Method, transport: Transport, in_sync: SyncCheck, *,
        dense: DensePolicy, exchange: str, bucket_bytes: int, seed: int, dense_steps: int,
        sparse_as_dense: bool,
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
        self._facts = [f"updates, exchange={exchange!r}, seed={seed}, dense_steps={dense_steps}"]
        self._compared = False
        self._in_sync, self._sparse_as_dense = in_sync, sparse_as_dense
        self._owned = Owned({p: name for name, p in trained})

    def close(self) -> None:
        """Let another optimizer have the parameters."""
        self._owned.remove()

    def begin(self) -> None:
        """Compare the ranks' options before the first step, and parameters if due; collective."""
        if not self._compared:
            self._compare(self._facts)
            self._compared = True
        slots = [slot for bucket in self.buckets for slot in bucket.slots]
        require_unchanged(self._frozen, [(slot.name, slot.parameter) for slot in slots])
        self._in_sync.check()

    @torch.no_grad()
    def average(
        self, groups: Sequence[dict[str, Any]], step: Callable[[], Any]
    ) -> tuple[bool, Any]:
        """Take a step, and put the mean of all ranks' changes in its place; collective.

        Args:
            groups: the optimizer's parameters, with this rank's gradients.
            step: changes the parameters.

        Returns:
            Whether the step was taken, and what `step` returned. It is left out if a gradient of
            any rank is not finite. If a change is not, the parameters are as they were.
        """
        gradients = [p.grad for group in groups for p in group["params"]]
        if not ask_all(self.transport, _are_finite(gradients))():
            self.count_left_out()
            return False, None
        if self._sparse_as_dense:
            _make_dense(groups)
        before = {slot.parameter: slot.parameter.clone() for b in self.buckets for slot in b.slots}
        with torch.enable_grad():
            stepped = step()
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
        return directions is not None, stepped


@contextmanager
def _hooks_after(optimizer: Any) -> Iterator[Callable[[], None]]:
    """Step hooks of the optimizer do not run inside, but when the result is called."""
    hooks = optimizer._optimizer_step_post_hooks

    def run() -> None:
        for hook in list(hooks.values()):
            hook(optimizer, (optimizer,), {})

    optimizer._optimizer_step_post_hooks = OrderedDict()
    try:
        yield run
    finally:
        optimizer._optimizer_step_post_hooks = hooks


def _require_average(op: Any) -> None:
    if not averages(op):
        raise UnsupportedError(
            f"got op={op!r} for updates, expected hvd.Average, because the mean of the ranks' "
            "updates is applied; leave it out, or take ef.DistributedOptimizer for sums"
        )


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
