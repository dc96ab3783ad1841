"""`ef.DistributedOptimizer`: Horovod's, with compression instead of dense allreduces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from ef_horovod.compressors.identity import Identity
from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.methods.no_feedback import NoFeedback
from ef_horovod.torch import wrapping
from ef_horovod.torch.engine import Engine
from ef_horovod.torch.loss_scale import (
    average_unscaled,
    require_scaler_call,
    take_call,
    unscale_averages,
)
from ef_horovod.torch.momentum import require_fit
from ef_horovod.torch.options import (
    Options,
    averages,
    open_transport,
    refuse_unsupported,
    reopened,
)
from ef_horovod.torch.parameters import name_parameters, settings_of
from ef_horovod.torch.wrapped import _Wrapped
from ef_horovod.training.momentum import for_one_rank, refuse_synchronize, warn_of_adam
from ef_horovod.training.options import check_options
from ef_horovod.training.policy import (
    DensePolicy,
    is_elastic,
    require_answers,
    require_method,
    small_or_vector,
    warn_of_surprises,
)

if TYPE_CHECKING:
    from ef_horovod.torch.elastic import Elastic
    from ef_horovod.torch.typed import WrappedOptimizer


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
    compression: Method = NoFeedback(Identity()),  # noqa: B008 - frozen
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
    grad_scaler: torch.amp.GradScaler | None = None,
    overlap: bool = True,
    check_sync: bool = True,
    timeout: float | None = None,
    transport: Any = None,
) -> WrappedOptimizer:
    """Wrap an optimizer so that its gradients are averaged over all ranks, compressed.

    The first ten keywords are those of `hvd.DistributedOptimizer`. The result is an instance of
    the wrapped optimizer's class with the same state and parameter groups. With a single rank it
    is the plain optimizer, with the momentum of `MomentumCorrection` if that is the method.
    `synchronize()`, `skip_synchronize()`, `set_backward_passes_per_step()` and
    `zero_grad(set_to_none=...)` work as in Horovod. New are `stats()`, `step_skipped`,
    `compression_state_dict()`, `load_compression_state_dict()` and `checkpoint()`. Every rank saves
    and loads its own error-feedback state. `checkpoint()` also makes servers save theirs.

    `rounds` counts the steps of the wrapped optimizer. With a quorum, a parameter server forms each
    round from some workers' gradients. `step()` then takes one step of the wrapped optimizer per
    finished round, so that all workers have the same model after the same round. Put per-round
    work, such as `scheduler.step()`, into `optimizer.register_step_post_hook`.

    If any rank's gradient has a NaN or an infinity, the step is dropped on all ranks. Parameters
    and error-feedback state stay unchanged, gradients become NaN, `step_skipped` is True.

    Args:
        optimizer: any torch optimizer that needs one gradient per step.
        named_parameters: `model.named_parameters()`; names must be equal on all ranks.
        compression: error-feedback method with its compressor, such as EF21(TopK(ratio=0.01)). With
            `MomentumCorrection` the optimizer must have no momentum, and SGD's weight decay gets
            that of the method.
        backward_passes_per_step: micro-batches whose gradients are summed before an exchange.
        op: "average" or "sum", or `hvd.Average` or `hvd.Sum`.
        gradient_predivide_factor: must be 1.0; sums are float32, which do not overflow.
        num_groups, groups: not supported; buckets replace them.
        sparse_as_dense: compress sparse gradients like all others. Otherwise their rows are sent
            uncompressed, each once, and stay sparse.
        process_set: Horovod process set to average over; default all ranks.
        dense: `dense(name, parameter)` says which parameters stay uncompressed (they share one
            allreduce); default `small_or_vector`. A method that it returns is that parameter's own;
            see also `ef.by_name`, `ef.dense_below` and `ef.dense_unless_smaller`.
        exchange: "auto" takes the cheapest exchange by the cost model. "auto:NETWORK", such as
            "auto:10gbit" or "auto:1gbit,2ms", takes the cheapest on that network, dense allreduce
            included. "gather" works with any compressor, "reduce" with linear ones. "double_pass"
            works with any compressor; each rank reduces one slice, so the cost does not grow with
            the number of ranks. "hierarchical" sums within a node of several ranks first; it needs
            hvd.init(process_sets="dynamic"), and is collective here. "server" is for a job started
            by `launch/server`, without `hvd.init()`; with "hierarchical:server" the workers of a
            node sum first.
        bucket_bytes: parameters are packed into buckets of about this many bytes of float32. Each
            is compressed as one vector and sent in one collective, during backward.
        seed: of random compressors.
        dense_steps: number of first steps that send uncompressed averages. Error feedback then
            starts from zero, and `MomentumCorrection` from its momentum.
        grad_scaler: the scaler. Needed only if you call `synchronize()` yourself.
        overlap: send buckets during backward (False: all of them in `synchronize`).
        check_sync: compare the ranks' parameters by hash (frozen ones too, once) before the first
            step changes them, and in steps 2, 4, 8 and so on (with a quorum only in the first).
            All ranks raise `OutOfSyncError` if they differ.
        timeout: seconds that a wait for other ranks may take; default $EF_HOROVOD_TIMEOUT or 300.
        transport: "horovod", "torch" (all ranks of `torch.distributed`), or
            `ef.TorchDistributed(group)`. Default: Horovod after `hvd.init()`, else
            `torch.distributed` if it is initialised.

    Raises:
        UnsupportedError: the combination cannot work; the message names an alternative.
        ValueError: names are missing or doubled, or a number is out of range.

    Example:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = ef.DistributedOptimizer(optimizer, model.named_parameters(),
                                            compression=ef.ErrorFeedback(ef.OneBit()))
    """
    refuse_unsupported(optimizer, op, gradient_predivide_factor, num_groups, groups)
    check_options("DistributedOptimizer", **locals() | {"transport": None})  # checked when opened
    method = require_method(compression)
    require_fit(optimizer, method)
    named, others = name_parameters(named_parameters, optimizer.param_groups)
    trainable = [(name, p) for name, p in named if p.requires_grad]
    frozen = [(name, p) for name, p in named if not p.requires_grad]
    require_answers(trainable, dense, method)
    wrapped = wrapping.wrap(optimizer, _Distributed)
    elastic = is_elastic()
    if elastic:
        from ef_horovod.torch.elastic import Elastic, refuse_fixed, register

        refuse_fixed(method, exchange, process_set, transport)
    transport = open_transport(exchange, process_set, timeout, method, transport)
    wrapped.outside = process_set is not None and not process_set.included()
    if transport is None:
        return wrapped
    if transport.size == 1 and not transport.has_server and not elastic:
        (method, dense), exchange = for_one_rank(method, dense), "auto"
    options = Options(
        method=method,
        dense=dense,
        exchange=exchange,
        bucket_bytes=bucket_bytes,
        passes=backward_passes_per_step,
        seed=seed,
        dense_steps=dense_steps,
        # Adam's update of a sum of gradients is that of their mean.
        average=averages(op) or method.makes_updates,
        sparse_as_dense=sparse_as_dense,
        overlap=overlap,
        check_sync=check_sync,
    )
    if transport.size > 1:
        warn_of_surprises(trainable, method, dense, transport.rank)
    scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
    wrapped._engine = Engine(trainable, frozen, options, transport, scaler, others)
    warn_of_adam(optimizer, wrapped._engine.methods(), transport.rank)
    if elastic:
        wrapped._elastic = Elastic(wrapped._engine, partial(reopened, transport))
        register()
    return wrapped


class _Distributed(_Wrapped):
    """What an optimizer that averages gradients can do besides."""

    _engine: Engine | None = None
    _elastic: Elastic | None = None
    _synchronized = False
    _should_synchronize = True
    rounds = 0
    _settings: Mapping[tuple[int, str], Any] = MappingProxyType({})  # after the last round

    def synchronize(self) -> None:
        """Finish the exchange: `p.grad` becomes the average, ready to be clipped.

        `zero_grad()` or `discard()` instead of `step()` leaves the step out and restores the
        error-feedback state. If parameters have changed meanwhile, the averages count as applied.
        """
        if self._elastic is not None:
            self._elastic.follow()
        if self._engine is not None and (self._engine.under_way or not self._synchronized):
            refuse_synchronize(self._engine.method)
            self.step_skipped = not self._engine.finish(undoable=True)
        self._synchronized = True

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """`step()` inside does not synchronize; use it after your own `synchronize()`."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Synchronize unless already done, then step unless the step was dropped.

        With servers that have a quorum: one step per finished round. All workers take the same
        rounds in the same order.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        engine = self._engine
        if engine is None:
            return self._base_step(loss, closure)
        require_fit(self, engine.method)
        if self._elastic is not None:
            self._elastic.follow()
        call = take_call(self)
        if self._should_synchronize and (engine.under_way or not self._synchronized):
            if engine.comes_in_rounds(scaled=call is not None):
                self._step_by_rounds(engine)
                return loss
            if call is None:
                require_scaler_call(engine)
            good = engine.finish() if call is None else average_unscaled(self, engine, call)
            self.step_skipped = not good
        elif engine.under_way:
            raise RuntimeError(
                "step() inside skip_synchronize() has gradients that are under way to other ranks, "
                "expected averaged ones; call synchronize() first"
            )
        else:
            good = not self.step_skipped and (call is None or unscale_averages(self, engine, call))
        self._synchronized = False
        if not good:
            return loss
        engine.keep()
        return self._base_step(loss, closure)

    def _base_step(self, loss: Any, closure: Callable[[], Any] | None) -> Any:
        stepped = self._apply()
        return loss if closure is not None else stepped

    def _apply(self) -> Any:
        """One step of the wrapped optimizer with the averages in `p.grad`."""
        if self._engine is not None:
            self._engine.decay.add_to_gradients(self)  # type: ignore[arg-type]
        self.rounds += 1
        return self._base.step(self)  # type: ignore[call-overload]

    def _step_by_rounds(self, engine: Engine) -> None:
        """One step per finished round, with the same settings on all workers."""
        for place, value in settings_of(self.param_groups).items():
            if self._settings.get(place, value) != value:
                raise UnsupportedError(
                    f"got {place[1]!r} changed between two steps with a quorum, expected a change "
                    "within a round, because workers are in different rounds; write optimizer."
                    "register_step_post_hook(lambda *_: scheduler.step())"
                )
        for _ in engine.rounds():
            self._apply()
        self._settings = settings_of(self.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; raises while gradients are under way."""
        if self._engine is not None and self._engine.under_way:
            raise RuntimeError(
                "zero_grad() was called between backward() and step(), expected it before "
                "backward() or after step(), because the gradients are being sent to other ranks; "
                "if another loss reached these parameters, take its gradients with "
                "torch.autograd.grad, freeze them with requires_grad_(False) for its backward(), "
                "or call discard() on all ranks"
            )
        self._clear(set_to_none)

    def discard(self) -> None:
        """Leave this step out on all ranks, before or after `synchronize()`.

        Restores the error-feedback state from before `backward()` and clears gradients. Call it on
        all ranks, because gradients under way must arrive. `stats()` counts their bytes.

        Raises:
            UnsupportedError: the parameter server has a quorum.

        Example:
            loss.backward()
            if spike:  # equal on all ranks
                optimizer.discard()
            else:
                optimizer.step()
        """
        if self._engine is not None:
            self._engine.leave_out()
        self._clear(set_to_none=True)

    def _clear(self, set_to_none: bool) -> None:
        """Clear gradients; unused averages make this a step left out."""
        self._synchronized = False
        if self._engine is not None:
            self._engine.clear()
            self._engine.reset_passes()
        self._base.zero_grad(self, set_to_none)  # type: ignore[arg-type]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch: learning rates, momenta and similar state, equal on all ranks."""
        self._synchronized = False
        if self._engine is not None:
            self._engine.reset_passes()
        _Wrapped.load_state_dict(self, state_dict)

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Accumulate another number of micro-batches from the next step on."""
        check_options("the optimizer", backward_passes_per_step=passes)
        if self._engine is not None:
            self._engine.set_passes(passes)

    def checkpoint(self) -> dict[str, Any]:
        """Make the servers save their state; return this rank's `compression_state_dict()`.

        All workers call it after the same step. Each saves the result with the model and the inner
        optimizer's `state_dict()`, one file per worker. Without servers it only returns the state.

        Raises:
            ProtocolError: the servers were started without --checkpoint, or with --quorum.
            RuntimeError: it was called between backward() and step().
        """
        under_way = self._engine is not None and self._engine.under_way
        if under_way or (self._synchronized and self._engine and not self.step_skipped):
            raise RuntimeError(
                "checkpoint() was called between backward() and step(), expected it after step(), "
                "when error-feedback state and model belong to the same step"
            )
        return _Wrapped.checkpoint(self)

    def merged_state_dict(self) -> dict[str, Any]:
        """See `_Wrapped.merged_state_dict`."""
        if self._elastic is not None:
            self._elastic.follow()
        return _Wrapped.merged_state_dict(self)

    def load_compression_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `compression_state_dict` or `checkpoint` of this rank.

        Raises:
            UnsupportedError: with servers, after the first step; servers load their state before.
            ValueError: the rank, number of ranks, method or model differs.
        """
        _Wrapped.load_compression_state_dict(self, state)
        if self._engine is not None:
            self.rounds = self._engine.step
        if self._elastic is not None:
            self._elastic.take(state)


# The base's step runs the users' hooks. `hooked` keeps torch from running them in ours again.
_Distributed.step.hooked = True  # type: ignore[attr-defined]
