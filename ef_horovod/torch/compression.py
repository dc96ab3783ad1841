"""`ef.Compression`: any compressor and method through stock `hvd.DistributedOptimizer`.

Horovod passes each gradient to `compress`, allreduces the returned tensor, and passes the result to
`decompress`. Our `compress` puts the gradient into its bucket, and starts the exchange of a full
one. It runs in the hook, so the exchange overlaps with backward. Horovod gets a single number to
reduce. The cost against `ef.DistributedOptimizer`: one small allreduce per parameter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence, Set
from functools import partial
from typing import Any

import horovod.torch as hvd
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.torch.buckets import Bucket, open_buckets, require_untouched
from ef_horovod.torch.hooks import uncompiled, weak
from ef_horovod.torch.momentum import require_fit, require_no_weight_decay
from ef_horovod.torch.parameters import pairs_of
from ef_horovod.torch.sync import SyncCheck
from ef_horovod.training.buckets import Slot
from ef_horovod.training.driver import StepDriver
from ef_horovod.training.momentum import (
    refuse_one_rank,
    refuse_rows,
    require_included,
    warn_of_adam,
)
from ef_horovod.training.options import check_options
from ef_horovod.training.policy import (
    DensePolicy,
    refuse_elastic,
    require_distinct,
    require_method,
    small_or_vector,
    warn_of_surprises,
)
from ef_horovod.training.state import move_state, read_state
from ef_horovod.transports.horovod import next_prefix
from ef_horovod.transports.horovod_torch import HorovodTorchTransport
from ef_horovod.transports.timeouts.ending import watch_over


class Compression(StepDriver[Bucket]):
    """An instance for the `compression=` argument of `hvd.DistributedOptimizer`.

    The constructor is collective: ranks compare their options. Buckets are those of
    `ef.DistributedOptimizer`, and so are the aggregated gradients. If any rank's gradient is not
    finite, all ranks keep their error-feedback state, and the optimizer's next step changes
    nothing. Horovod itself gathers the rows of sparse gradients, uncompressed. `op=hvd.Adasum` and
    `sparse_as_dense=True` are not supported.

    Make one for each optimizer. The first step shows which parameters it gets dense gradients of;
    the same ones come in each step.

    Args:
        method: error-feedback method with its compressor.
        named_parameters: `model.named_parameters()`, as passed to Horovod.
        dense: `dense(name, parameter)` says which parameters stay uncompressed, or returns a
            method.
        exchange: "auto", "auto:NETWORK", "gather", "reduce", "double_pass" or
            "hierarchical".
        bucket_bytes: bytes of float32 per compressed bucket; 1 compresses each parameter by itself.
        seed: of random compressors.
        dense_steps: as in `ef.DistributedOptimizer`.
        process_set: as passed to Horovod.
        grad_scaler: the scaler, if one is used. It keeps error-feedback state in unscaled units.
        check_sync: compare the ranks' parameters by hash before the first step changes them, and
            in steps 2, 4, 8 and so on. All ranks raise `OutOfSyncError` if they differ.
        timeout: seconds that each of our waits may take; default $EF_HOROVOD_TIMEOUT or 300. In a
            step Horovod waits first. That wait has no limit unless
            HOROVOD_STALL_SHUTDOWN_TIME_SECONDS is set.

    Raises:
        ConfigMismatchError: on all ranks, if their options or parameters differ.
        UnsupportedError: `method` is not a method, or the job is elastic, with the way out. After
            the first step: the optimizer has momentum or weight decay beside `MomentumCorrection`;
            or other parameters have dense gradients than in that step.
        ValueError: a name or parameter occurs twice.

    Example:
        optimizer = hvd.DistributedOptimizer(
            optimizer, model.named_parameters(),
            compression=ef.Compression(ef.EF21(ef.TopK(0.01)), model.named_parameters()))
    """

    def __init__(
        self,
        method: Method,
        named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
        *,
        dense: DensePolicy = small_or_vector,
        exchange: str = "auto",
        bucket_bytes: int = 25 * 2**20,
        seed: int = 0,
        dense_steps: int = 0,
        process_set: Any = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        check_sync: bool = True,
        timeout: float | None = None,
    ) -> None:
        refuse_elastic()
        check_options("Compression", **locals())
        method = require_method(method)
        prefix = next_prefix("ef.stock", process_set)
        transport = HorovodTorchTransport(prefix, process_set, timeout)
        watch_over(transport, hvd.shutdown)
        refuse_one_rank(method, hvd.size())  # not that of the process set
        require_included(method, transport.rank >= 0)
        self._directions: dict[str, torch.Tensor] | None = None
        self._dropped = False  # the last step was dropped, and no optimizer has stepped since
        self._unused = False  # averages were delivered, and no optimizer has stepped since
        self._grad_scaler, self._loss_scale = grad_scaler, 1.0
        self._stop_watching: Callable[[], Any] = lambda: None
        named = pairs_of(named_parameters)
        trainable = [(name, p) for name, p in named if p.requires_grad]
        frozen = [p for _, p in named if not p.requires_grad]
        self._parameters = dict(require_distinct(trainable))
        warn_of_surprises(trainable, method, dense, transport.rank)
        self._in_sync = SyncCheck([p for _, p in trainable], transport, check_sync, frozen)
        self._order, self._next_place = list(reversed(self._parameters)), 0
        super().__init__(method, transport)
        self._settled = False
        self._buckets_of = partial(
            open_buckets,
            method=method,
            transport=transport,
            dense=dense,
            exchange=exchange,
            bucket_bytes=bucket_bytes,
            seed=seed,
            dense_steps=dense_steps,
        )
        self._use(self._buckets_of(trainable))
        if transport.rank >= 0:  # not outside of the process set
            # Not in a hook: the order of hooks differs between ranks.
            options = f"exchange={exchange!r}, seed={seed}, dense_steps={dense_steps}"
            self._compare([f"{options}, check_sync={check_sync}"])

    @property
    def _under_way(self) -> bool:
        """Whether gradients were taken that no rank's optimizer has got."""
        return any(bucket.filled for bucket in self.buckets)

    @uncompiled
    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[str, torch.Tensor]]:
        """Called by Horovod for each gradient; starts the exchange of a full bucket."""
        name = self._name_of(tensor)
        if name not in self._place:
            raise UnsupportedError(
                f"got a dense gradient of '{name}', which had none in the first step, expected "
                "those of the same parameters in each step; make an ef.Compression for each "
                "optimizer, or take ef.DistributedOptimizer"
            )
        if not self._under_way:
            self._begin()
        bucket, slot = self._place[name]
        bucket.fill(slot, self._loss_scale, in_place=self._grad_scaler is None)
        if self._settled and len(bucket.filled) == len(bucket.slots):
            bucket.start(self.step)
        # Horovod needs a tensor to allreduce: a 1, which returns as 1 for Average, n for Sum.
        return torch.ones(1, device=tensor.device), (name, tensor)

    @uncompiled
    def decompress(
        self, tensor: torch.Tensor, ctx: tuple[str, torch.Tensor] | None
    ) -> torch.Tensor:
        """Called by Horovod for each parameter once all of them have been compressed."""
        if ctx is None:  # a sparse gradient: Horovod has gathered its rows
            refuse_rows(self.method, "a parameter")
            return tensor
        name, gradient = ctx
        if self._directions is None:
            self._finish_all()
        assert self._directions is not None
        direction = self._directions.pop(name)
        if not self._directions:
            self._directions = None
        # Adam's update of a sum of gradients is that of their mean.
        summed = 1.0 if self.method.makes_updates else tensor.round()[0]
        factor = summed * self._loss_scale
        return gradient.copy_(direction.view(gradient.shape)).mul_(factor)

    def _begin(self) -> None:
        """Before the first gradient of a step."""
        if self._unused:
            raise UnsupportedError(
                "got a backward pass after synchronize() without step(), expected step(), because "
                "error-feedback state holds the averages already; take ef.DistributedOptimizer, "
                "whose zero_grad() and discard() leave a step out"
            )
        self._loss_scale = self._grad_scaler.get_scale() if self._grad_scaler is not None else 1.0

    def _finish_all(self) -> None:
        """Wait for all channels of this step; commit all of them or none."""
        self._in_sync.check()
        self._settle()
        for bucket in self.buckets:
            if not bucket.started:
                bucket.start(self.step)
        require_untouched(self.buckets)
        directions = self._finish()
        self._stop_watching()
        self._dropped = directions is None
        self._unused = directions is not None and self.has_state
        if directions is None:
            self._watch(register_optimizer_step_pre_hook(weak(self._before_any_step)))
            nothing = torch.tensor(float("nan"))
            directions = [nothing.expand(len(b.channel.gradient)) for b in self.buckets]
        else:
            self._watch(register_optimizer_step_post_hook(weak(self._after_any_step)))
        self._directions = {
            slot.name: direction[slot.start : slot.stop]
            for bucket, direction in zip(self.buckets, directions, strict=True)
            for slot in bucket.slots
        }
        for bucket in self.buckets:
            bucket.release()

    def _settle(self) -> None:
        """In the first step, leave parameters without a dense gradient out of the buckets.

        All ranks leave out the same ones, because Horovod cannot carry one both ways.

        Raises:
            UnsupportedError: later, if such a gradient is missing.
        """
        missing = {
            slot.name: slot.parameter
            for bucket in self.buckets
            for slot in bucket.slots
            if slot.parameter not in bucket.filled
        }
        if missing and self._settled:
            raise UnsupportedError(
                f"got no dense gradient of '{min(missing)}', expected those of the same parameters "
                "in each step; make an ef.Compression for each optimizer, or take "
                "ef.DistributedOptimizer"
            )
        if missing:
            self._keep({name for name in self._place if name not in missing})
        self._settled = True

    def _keep(self, names: Set[str]) -> None:
        """Make new buckets of these parameters, with their state and this step's gradients."""
        before, place = self.buckets, self._place
        self._use(self._buckets_of([(n, p) for n, p in self._parameters.items() if n in names]))
        move_state(before, self.buckets)
        for name, (bucket, slot) in self._place.items():
            old, at = place[name]
            if slot.parameter in old.filled:
                bucket.filled[slot.parameter] = old.filled[slot.parameter]
                gradient = old.channel.gradient[at.start : at.stop]
                bucket.channel.gradient[slot.start : slot.stop].copy_(gradient)

    def _use(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = buckets
        self._place: dict[str, tuple[Bucket, Slot]] = {
            slot.name: (bucket, slot) for bucket in buckets for slot in bucket.slots
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As in `StepDriver`; parameters whose gradients were sparse have no state."""
        before = self.buckets
        without = read_state(before).keys() - dict(state.get("parameters", {})).keys()
        if without and not self._settled:
            self._keep(self._place.keys() - without)
        try:
            super().load_state_dict(state)
        except Exception:
            self._use(before)
            raise

    def _watch(self, hook: Any) -> None:
        """Keep a hook on optimizer steps until the next step is finished."""
        self._stop_watching = weakref.finalize(self, hook.remove)

    @uncompiled
    def _after_any_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Note that the averages were used; check the optimizer, unknown before its first step."""
        if self._owned_by(optimizer):
            self._unused = False
            self._stop_watching()
            require_fit(optimizer, self.method)
            if self.transport.size > 1 and self._steps_done() == 1:
                warn_of_adam(optimizer, self.methods(), self.transport.rank)
            require_no_weight_decay(optimizer.param_groups, self.method)

    @uncompiled
    def _before_any_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Remove the gradients of a dropped step before the optimizer would use them.

        Optimizers skip parameters without a gradient, with their momentum and weight decay.
        Horovod's own `step` also calls this hook, before it synchronizes. Gradients of the next
        step are then under way, and there is nothing to do.
        """
        if not self._dropped or self._under_way:
            return
        for parameter in self._owned_by(optimizer):
            parameter.grad = None
            self._dropped = False

    def _owned_by(self, optimizer: torch.optim.Optimizer) -> set[torch.Tensor]:
        ours = set(self._parameters.values())
        return ours.intersection(p for group in optimizer.param_groups for p in group["params"])

    def _name_of(self, tensor: torch.Tensor) -> str:
        # Gradients come in nearly the same order each step: search from the last one on.
        for offset in range(len(self._order)):
            place = (self._next_place + offset) % len(self._order)
            name = self._order[place]
            if self._parameters[name].grad is tensor:
                self._next_place = place + 1
                return name
        raise UnsupportedError(
            f"got a tensor of shape {tuple(tensor.shape)} to compress that is no gradient of the "
            "named parameters, expected one, with the dense gradients and op=Average of "
            "hvd.DistributedOptimizer; pass the same model.named_parameters() to both, "
            "without Adasum and sparse_as_dense"
        )
