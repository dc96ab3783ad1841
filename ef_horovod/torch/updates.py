"""Compressed updates: each rank's optimizer makes an update from its own gradients, and the updates
are averaged.

Nothing is asked of the optimizer, because what is compressed is the change that it made to the
parameters, in one step or in several.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.torch import wrapping
from ef_horovod.torch.loss_scale import lower_scale, take_call, unscale
from ef_horovod.torch.options import averages, open_transport, refuse_unsupported
from ef_horovod.torch.parameters import name_parameters
from ef_horovod.torch.sync import SyncCheck
from ef_horovod.torch.update_engine import UpdateEngine
from ef_horovod.torch.wrapped import _Wrapped
from ef_horovod.training.options import check_options
from ef_horovod.training.policy import (
    DensePolicy,
    refuse_elastic,
    require_method,
    small_or_vector,
)
from ef_horovod.training.updates import refuse_for_updates

if TYPE_CHECKING:
    from ef_horovod.torch.typed import UpdatingOptimizer


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
    local_steps: int = 1,
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

    With `local_steps=H`, ranks exchange in every H-th step, and send the change of H steps. Between
    exchanges their parameters differ, and the copy stays in memory. Call `exchange()` before
    validation, before the model is saved, and at the end. Buffers such as the statistics of batch
    norm are each rank's own. A NaN or an infinity in a gradient then leaves out the step on this
    rank alone; one in a change drops the exchange, and all ranks return to the parameters of the
    last one.

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
        exchange: as in `ef.DistributedOptimizer`; a server must wait for all workers (no quorum).
        bucket_bytes: bytes of float32 per compressed bucket.
        seed: of random compressors.
        dense_steps: number of first exchanges that average uncompressed updates.
        local_steps: steps per exchange, equal on all ranks. Schedules of compressors count
            exchanges, those of learning rates steps.
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
        whose compressed quantity is the step. Local steps: Douillard et al.: DiLoCo (2023), with a
        mean as the outer step; Sarfi et al.: SparseLoCo (arXiv 2508.15706, 2025), whose error
        memory decays: `ErrorFeedback(..., decay=0.95)`.
    """
    _require_average(op)
    refuse_elastic()
    refuse_unsupported(optimizer, op, gradient_predivide_factor, num_groups, groups)
    check_options("CompressedUpdates", **locals() | {"transport": None})  # checked when opened
    method = require_method(compression)
    refuse_for_updates(method)
    named, others = name_parameters(named_parameters, optimizer.param_groups)
    wrapped = wrapping.wrap(optimizer, _Updating)
    transport = open_transport(exchange, process_set, timeout, method, transport)
    wrapped.outside = process_set is not None and not process_set.included()
    if transport is not None:
        wrapped._engine = UpdateEngine(
            named,
            method,
            transport,
            SyncCheck([p for _, p in named], transport, check_sync, others),
            dense=dense,
            exchange=exchange,
            bucket_bytes=bucket_bytes,
            seed=seed,
            dense_steps=dense_steps,
            local_steps=local_steps,
            sparse_as_dense=sparse_as_dense,
        )
    return wrapped


class _Updating(_Wrapped):
    """What an optimizer whose updates are averaged can do besides."""

    _engine: UpdateEngine | None = None

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
            good, stepped = engine.average(
                self.param_groups,
                lambda: self._base.step(self),  # type: ignore[call-overload]
                overflow=call is not None and call.found_inf,
            )
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

    def exchange(self) -> None:
        """Exchange what changed since the last exchange now, with `local_steps`; collective.

        Call it on all ranks after the same step. All of them have the same parameters then. It does
        nothing right after an exchange, and with a single rank.
        """
        if self._engine is not None and self._engine.since:
            self._engine.begin()  # a loaded state may come before the first step
            self.step_skipped = not self._engine.exchange()

    def unwrap(self) -> None:
        """As of all wrapped optimizers; not between exchanges.

        Raises:
            RuntimeError: local steps were taken since the last exchange.
        """
        if self._engine is not None:
            self._engine.require_exchanged("unwrap()")
        _Wrapped.unwrap(self)


# Hooks run in the base's step. `hooked` keeps torch from running them in ours again.
_Updating.step.hooked = True  # type: ignore[attr-defined]


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
