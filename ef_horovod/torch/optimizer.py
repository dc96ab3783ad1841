"""`ef.DistributedOptimizer`: Horovod's, with compression in place of dense allreduces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import horovod.torch as hvd
import torch

from ef_horovod.compressors.identity import Identity
from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.channel import ChannelStats
from ef_horovod.methods.base import Method
from ef_horovod.methods.no_feedback import NoFeedback
from ef_horovod.torch import wrapping
from ef_horovod.torch.loss_scale import (
    average_unscaled,
    require_scaler_call,
    take_call,
    unscale_averages,
)
from ef_horovod.torch.options import Options, refuse_unsupported
from ef_horovod.torch.parameters import name_parameters
from ef_horovod.torch.reducer import Reducer
from ef_horovod.training.choice import wants_server
from ef_horovod.training.options import check_options
from ef_horovod.training.policy import (
    DensePolicy,
    refuse_process_set,
    require_method,
    small_or_vector,
    warn_of_surprises,
)
from ef_horovod.transports.base import Transport
from ef_horovod.transports.horovod import next_prefix
from ef_horovod.transports.horovod_torch import HorovodTorchTransport
from ef_horovod.transports.timeouts.ending import watch_over

if TYPE_CHECKING:
    from ef_horovod.torch.typed import WrappedOptimizer


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
    compression: Method = NoFeedback(Identity()),  # noqa: B008 - frozen
    backward_passes_per_step: int = 1,
    op: Any = hvd.Average,
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
    grad_scaler: torch.amp.GradScaler | None = None,
    overlap: bool = True,
    check_sync: bool = True,
    timeout: float | None = None,
) -> WrappedOptimizer:
    """Wrap an optimizer so that its gradients are averaged over all ranks, compressed.

    The first ten keywords are those of `hvd.DistributedOptimizer`. The result is an instance of
    the wrapped optimizer's class with the same state and parameter groups; with a single rank it
    is the plain optimizer. `synchronize()`, `skip_synchronize()` and
    `set_backward_passes_per_step()` work as in Horovod, `zero_grad(set_to_none=...)` too. New are
    `stats()`, `step_skipped`, `compression_state_dict()` / `load_compression_state_dict()` (error
    memories belong to a rank, so every rank saves and loads its own) and `checkpoint()`, which has
    servers save theirs too.

    `rounds` counts the steps of the wrapped optimizer. A parameter server with a quorum makes
    rounds of some workers' gradients: `step()` then takes a step of the wrapped optimizer for each
    round that went by, so that all workers have the same model after the same round. What belongs
    to each of them, such as `scheduler.step()`, goes into `optimizer.register_step_post_hook`.

    If any rank's gradient has a NaN or an infinity, the step is dropped on all ranks: parameters
    and memories stay as they were, gradients become NaN, `step_skipped` is True.

    Args:
        optimizer: any torch optimizer that needs one gradient a step.
        named_parameters: `model.named_parameters()`; names must be equal on all ranks.
        compression: error-feedback method with its compressor, such as EF21(TopK(ratio=0.01)).
        backward_passes_per_step: micro-batches whose gradients are summed before an exchange.
        op: `hvd.Average` or `hvd.Sum`.
        gradient_predivide_factor: 1.0; sums are float32 here and need no help.
        num_groups, groups: not needed, buckets take their place.
        sparse_as_dense: compress sparse gradients like all others; otherwise their rows are sent
            as they are, each once, and stay sparse.
        process_set: Horovod process set to average over; default all ranks.
        dense: `dense(name, parameter)` says which parameters stay uncompressed (they share one
            allreduce); default `small_or_vector`.
        exchange: "auto", the cheapest one by the cost model, or with a network as in "auto:10gbit"
            and "auto:1gbit,2ms" the cheapest one there, dense sums included; "gather" (any
            compressor), "reduce" (linear ones) or "double_pass" (any compressor, in slices that
            ranks reduce for each other: cost does not grow with them) among Horovod's ranks; or
            "server" in a job that `launch/server` started, which needs no `hvd.init()`.
        bucket_bytes: parameters are packed into buckets of about this many bytes of float32; each
            is compressed as one vector and sent in one collective, during backward.
        seed: of random compressors.
        grad_scaler: the scaler; needed only by those who call `synchronize()`, before which the
            optimizer must know it.
        overlap: send buckets during backward (False: all of them in `synchronize`).
        check_sync: compare the ranks' parameters by hash (frozen ones too, once) before the first
            step changes them, and in the steps 2, 4, 8 and so on (with a quorum in the first one
            alone); they raise `OutOfSyncError` if ranks differ.
        timeout: seconds that a wait for other ranks may take; default $EF_HOROVOD_TIMEOUT or 300.

    Raises:
        UnsupportedError: a combination that cannot work, with the way out.
        ValueError: names missing or doubled, or a number out of range.

    Example:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = ef.DistributedOptimizer(optimizer, model.named_parameters(),
                                            compression=ef.ErrorFeedback(ef.OneBit()))
    """
    refuse_unsupported(optimizer, op, gradient_predivide_factor, num_groups, groups)
    check_options("DistributedOptimizer", **locals())
    options = Options(
        method=require_method(compression),
        dense=dense,
        exchange=exchange,
        bucket_bytes=bucket_bytes,
        passes=backward_passes_per_step,
        seed=seed,
        average=op == hvd.Average,
        sparse_as_dense=sparse_as_dense,
        overlap=overlap,
        check_sync=check_sync,
    )
    named, others = name_parameters(named_parameters, optimizer.param_groups)
    wrapped = wrapping.wrap(optimizer, _Distributed)
    transport = _open_transport(exchange, process_set, timeout)
    if transport is not None:
        trainable = [(name, p) for name, p in named if p.requires_grad]
        frozen = [(name, p) for name, p in named if not p.requires_grad]
        warn_of_surprises(trainable, options.method, dense, transport.rank)
        scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        wrapped._reducer = Reducer(trainable, frozen, options, transport, scaler, others)
    return wrapped


def _open_transport(exchange: str, process_set: Any, timeout: float | None) -> Transport | None:
    """To the other ranks or to the servers; None if there is nobody to average with."""
    if wants_server(exchange):
        from ef_horovod.server.client import ServerTransport

        refuse_process_set(process_set)
        return ServerTransport(timeout)
    process_set = process_set or hvd.global_process_set
    prefix = next_prefix("ef", process_set)  # wrap optimizers in the same order on all ranks
    if process_set.included() and process_set.size() > 1:
        transport = HorovodTorchTransport(prefix, process_set, timeout)
        watch_over(transport, hvd.shutdown)
        return transport
    return None


class _Distributed:
    """The methods that a wrapped optimizer's class gets on top of the user's class `_base`.

    They go into the class itself and not into a base of it, under Horovod's module name, because
    `hvd.broadcast_optimizer_state` takes `super(type(optimizer), optimizer).step` for the plain
    step of such an optimizer.
    """

    _base: type[torch.optim.Optimizer]
    _reducer: Reducer | None = None
    _synchronized = False
    _should_synchronize = True
    step_skipped = False
    rounds = 0
    _settings: Mapping[tuple[int, str], Any] = MappingProxyType({})  # after the last round
    param_groups: list[dict[str, Any]]

    def synchronize(self) -> None:
        """Finish the exchange: `p.grad` becomes the average, ready to be clipped.

        `zero_grad()` or `discard()` in place of `step()` leaves the step out: error-feedback state
        is as before it then. Averages that have changed parameters otherwise count as applied.
        """
        if self._reducer is not None and (self._reducer.under_way or not self._synchronized):
            self.step_skipped = not self._reducer.finish(undoable=True)
        self._synchronized = True

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """`step()` inside does not synchronize, for code that called `synchronize()` itself."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Synchronize unless that was done, then step; not if the step was dropped.

        With servers that have a quorum: a step for each round that went by, the same ones in the
        same order on all workers.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        reducer = self._reducer
        if reducer is None:
            return self._base_step(loss, closure)
        call = take_call(self)
        if self._should_synchronize and (reducer.under_way or not self._synchronized):
            if reducer.comes_in_rounds(scaled=call is not None):
                self._step_by_rounds(reducer)
                return loss
            if call is None:
                require_scaler_call(reducer)
            good = reducer.finish() if call is None else average_unscaled(self, reducer, call)
            self.step_skipped = not good
        elif reducer.under_way:
            raise RuntimeError(
                "step() inside skip_synchronize() has gradients that are under way to other ranks, "
                "expected averaged ones; call synchronize() first"
            )
        else:
            good = not self.step_skipped and (call is None or unscale_averages(self, reducer, call))
        self._synchronized = False
        if not good:
            return loss
        reducer.keep()
        return self._base_step(loss, closure)

    def _base_step(self, loss: Any, closure: Callable[[], Any] | None) -> Any:
        stepped = self._base.step(self)  # type: ignore[call-overload]
        self.rounds += 1
        return loss if closure is not None else stepped

    def _step_by_rounds(self, reducer: Reducer) -> None:
        """A step for each round that went by, with the same settings on all workers."""
        for place, value in _settings_of(self.param_groups).items():
            if self._settings.get(place, value) != value:
                raise UnsupportedError(
                    f"got {place[1]!r} changed between two steps with a quorum, expected it in a "
                    "round, for workers are in different ones; write optimizer."
                    "register_step_post_hook(lambda *_: scheduler.step())"
                )
        for _ in reducer.rounds():
            self._base.step(self)  # type: ignore[call-overload]
            self.rounds += 1
        self._settings = _settings_of(self.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; raises while gradients are under way."""
        if self._reducer is not None and self._reducer.under_way:
            raise RuntimeError(
                "zero_grad() was called between backward() and step(), expected it before "
                "backward() or after step(), for the gradients are under way to other ranks; if "
                "another loss reached these parameters, take its gradients with "
                "torch.autograd.grad, freeze them with requires_grad_(False) for its backward(), "
                "or call discard() on all ranks"
            )
        self._clear(set_to_none)

    def discard(self) -> None:
        """Leave this step out on all ranks: as `zero_grad()` after `synchronize()`, or before it.

        Error-feedback state is as before `backward()`, gradients are cleared. Call it on all ranks:
        gradients under way have to arrive. They were sent, so `stats()` counts their bytes.

        Raises:
            UnsupportedError: with a parameter server that has a quorum.

        Example:
            loss.backward()
            if spike:  # equal on all ranks
                optimizer.discard()
            else:
                optimizer.step()
        """
        if self._reducer is not None:
            self._reducer.leave_out()
        self._clear(set_to_none=True)

    def _clear(self, set_to_none: bool) -> None:
        """Clear gradients; averages among them with which nothing was done are a step left out."""
        self._synchronized = False
        if self._reducer is not None:
            self._reducer.clear()
            self._reducer.reset_passes()
        self._base.zero_grad(self, set_to_none)  # type: ignore[arg-type]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler calls `step()` in every step: see `loss_scale`."""
        return self._reducer is not None or self.__dict__.get("_step_supports_amp_scaling", False)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self.__dict__["_step_supports_amp_scaling"] = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the new parameters would not be averaged."""
        raise UnsupportedError(
            "got a new parameter group for a wrapped optimizer, expected none, for its gradients "
            "would not be averaged; add it to the optimizer before wrapping"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch: learning rates, momenta and the like, which are equal on all ranks."""
        self._synchronized = False
        if self._reducer is not None:
            self._reducer.reset_passes()
        with wrapping.same_groups(self):  # type: ignore[arg-type]
            self._base.load_state_dict(self, state_dict)  # type: ignore[arg-type]

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Accumulate another number of micro-batches from the next step on."""
        check_options("the optimizer", backward_passes_per_step=passes)
        if self._reducer is not None:
            self._reducer.set_passes(passes)

    def unwrap(self) -> None:
        """Be the plain optimizer again: hooks and memories are gone, and so are these methods.

        State and parameter groups stay. It can be wrapped again, for instance after layers were
        frozen, and so can a copy, which has no exchange with other ranks before that.
        """
        if self._reducer is not None:
            self._reducer.close()
        wrapping.unwrap(self, _Distributed)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return wrapping.copied(self, _Distributed, protocol)

    @property
    def transport(self) -> Transport | None:
        """To the other workers, whose `rank` and `size` it knows; None with a single rank."""
        return self._reducer.transport if self._reducer is not None else None

    def stats(self) -> list[ChannelStats]:
        """One row for each bucket and a last one with the total; empty with a single rank.

        Bytes, relative compression error of the last step, and seconds spent compressing, waiting
        and decompressing. Call it between steps.
        """
        return self._reducer.stats() if self._reducer is not None else []

    def compression_state_dict(self) -> dict[str, Any]:
        """This rank's error memories by parameter name; save one file a rank."""
        return self._reducer.state_dict() if self._reducer is not None else {}

    def checkpoint(self) -> dict[str, Any]:
        """Have the servers write their memories; this rank's, as `compression_state_dict` has them.

        All workers call it after the same step, and save the result with the model and the inner
        optimizer's `state_dict()`, one file a worker. Without servers there is nobody to ask.

        Raises:
            ProtocolError: the servers were started without --checkpoint, or with --quorum.
            RuntimeError: called between backward() and step().
        """
        reducer = self._reducer
        if reducer is None:
            return {}
        if reducer.under_way or (self._synchronized and not self.step_skipped):
            raise RuntimeError(
                "checkpoint() was called between backward() and step(), expected it after step(), "
                "when memories and model belong to the same step"
            )
        return reducer.checkpoint()

    def load_compression_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `compression_state_dict` or `checkpoint` returned on this rank.

        Raises:
            UnsupportedError: with servers, after the first step: they read theirs before it.
            ValueError: another rank, number of ranks, method or model.
        """
        if self._reducer is not None:
            self._reducer.load_state_dict(state)
            self.rounds = self._reducer.step


# The base's step runs the hooks that users registered; ours must not be wrapped to run them again.
_Distributed.step.hooked = True  # type: ignore[attr-defined]


def _settings_of(groups: list[dict[str, Any]]) -> dict[tuple[int, str], Any]:
    """Learning rates and all else that parameter groups say, by group and name."""
    return {
        (i, name): float(value) if isinstance(value, torch.Tensor) else value
        for i, group in enumerate(groups)
        for name, value in group.items()
        if name != "params"
    }
