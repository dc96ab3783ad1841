"""From gradient hooks to averaged gradients: one step of all buckets.

A bucket's exchange starts when the last of its gradients is ready, while backward continues.
A step is committed only after all buckets have arrived, so that a NaN on any rank drops the whole
step on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ef_horovod.errors import UnsupportedError
from ef_horovod.torch.averages import Averages
from ef_horovod.torch.buckets import Bucket, Taken, in_order, require_untouched
from ef_horovod.torch.hooks import GradientHooks
from ef_horovod.torch.momentum import DecayVelocity
from ef_horovod.torch.options import Options
from ef_horovod.torch.parameters import require_unchanged
from ef_horovod.torch.rows import RowsBucket, agree, make_buckets, no_rows
from ef_horovod.torch.sync import SyncCheck
from ef_horovod.training.buckets import Slot
from ef_horovod.training.driver import StepDriver
from ef_horovod.training.momentum import refuse_rows
from ef_horovod.training.state import load_state, move_state
from ef_horovod.transports.base import Transport

Named = list[tuple[str, torch.Tensor]]


class Engine(StepDriver[Bucket]):
    """Averages gradients over ranks, compressed; installs hooks on the parameters.

    Args:
        trainable: parameters with their names, equal on all ranks.
        frozen: parameters that must not start to require a gradient.
        options: see `Options`.
        transport: to the other ranks.
        scaler: of the loss, so that error-feedback state is kept in unscaled units.
        others: frozen parameters outside the optimizer, for `SyncCheck`.
    """

    def __init__(
        self,
        trainable: Named,
        frozen: Named,
        options: Options,
        transport: Transport,
        scaler: torch.amp.GradScaler | None = None,
        others: Sequence[torch.Tensor] = (),
    ) -> None:
        super().__init__(options.method, transport)
        self.options, self._frozen = options, frozen
        self.scaler, self._loss_scale = scaler, 1.0
        self.decay = DecayVelocity(options.method)
        self._averages: Averages | None = None  # delivered, not yet applied
        self._config_checked = False
        self._others = others
        self._sparse: set[torch.Tensor] = set()  # densified in this step
        self._trainable = trainable
        self.is_stale: Callable[[], bool] = lambda: False  # in elastic jobs: see `Elastic`
        self._open(transport)
        self._hooks = GradientHooks(dict(self.named_parameters()), self._on_gradient)

    def _open(self, transport: Transport) -> None:
        """Begin between the ranks of a transport, without state."""
        self.transport = transport
        parameters = [p for _, p in [*self._trainable, *self._frozen]]
        self._in_sync = SyncCheck(parameters, transport, self.options.check_sync, self._others)
        # Parameters sent as rows are known only when all ranks have their first gradients.
        self._rows_known = self.options.sparse_as_dense or transport.has_server
        self._use(self._make_buckets({}), {})
        self.reset_passes()

    def renew(self, transport: Transport) -> None:
        """Begin anew between other ranks, without state; a step under way is forgotten."""
        for bucket in self.buckets:
            bucket.channel.abandon()
        self._averages, self._config_checked = None, False
        self.step, self.decay = 0, DecayVelocity(self.method)
        self._sparse.clear()
        self._open(transport)

    @property
    def under_way(self) -> bool:
        """Whether gradients were taken that `finish` has not delivered."""
        return any(bucket.filled for bucket in self.buckets)

    def named_parameters(self) -> list[tuple[torch.Tensor, str]]:
        """All parameters whose gradients are averaged, with their names."""
        return [(parameter, slot.name) for parameter, (_, slot) in self._place.items()]

    def reset_passes(self) -> None:
        """Restart the count of backward passes."""
        self._passes_left = dict.fromkeys(self._place, self.options.passes)

    def set_passes(self, passes: int) -> None:
        """Accumulate another number of backward passes, from the next step on.

        Raises:
            RuntimeError: a step is under way.
        """
        if self.under_way:
            raise RuntimeError(
                f"got backward_passes_per_step={passes} between backward() and step(), expected "
                "the change after step(); gradients are under way to other ranks"
            )
        self.options = replace(self.options, passes=passes)
        self.reset_passes()

    def begin(self) -> None:
        """Before the first exchange: compare the ranks' and servers' options; collective.

        Do not call it in a hook, because the order of hooks differs between ranks.
        """
        if not self._config_checked:
            scaled = self.scaler is not None
            self._compare([self.options.facts(scaled=scaled)], several_rounds=True)
            self._config_checked = True

    def finish(self, *, undoable: bool = False, scale: float | None = None) -> bool:
        """Send the remaining buckets, wait, and put the averages into `p.grad`.

        Args:
            undoable: whether the step may still be left out, by `undo`; `keep` ends this.
            scale: if a GradScaler calls: the factor that gradients still contain. Averages are
                then delivered without a loss scale.

        Returns:
            Whether the step is good. If some rank's gradient was not finite, all ranks return
            False, error-feedback state is unchanged, and all gradients are NaN to prevent their
            use.

        Raises:
            UnsupportedError: a server's rounds do not wait for all workers; use `rounds`.
        """
        self._require_unchanged()
        self.begin()
        if self.transport.quorum is not None:
            raise UnsupportedError(
                f"synchronize() got a server with a quorum of {self.transport.quorum}, expected "
                "step() alone, which applies several rounds with a gradient each; leave out what "
                "comes between the two (clipping, a GradScaler), or start the server without "
                "--quorum"
            )
        if scale is not None:
            self._loss_scale = scale
        elif not self.under_way:
            self._loss_scale = self._scale_now()
        if self.transport.in_order and self._rows_known:  # before any other collective
            self._start_rest()
        self._in_sync.check()
        self._agree_on_rows()
        self._start_rest()
        if scale is None:
            require_untouched(self.buckets)
        directions = self._finish(undoable=undoable)
        self._release()
        self._deliver(directions or [None] * len(self.buckets), unscaled=scale is not None)
        self._sparse.clear()
        good = directions is not None
        if good and undoable:
            self._averages = Averages(self._place)
        return good

    @property
    def undoable(self) -> bool:
        """Whether delivered averages were neither applied nor left out yet."""
        return self._averages is not None

    def keep(self) -> None:
        """Note that the averages were applied, or went into the next gradient."""
        self._averages = None

    def clear(self) -> None:
        """Averages are cleared: leave the step out, unless they have changed parameters.

        Parameters change by an update by hand, or by an optimizer inside another one.
        """
        if self._averages is not None:
            self.keep() if self._averages.were_applied() else self.undo()

    def undo(self) -> None:
        """Leave out the delivered step: restore the error-feedback state from before it."""
        self._undo()
        self._averages = None

    def leave_out(self) -> None:
        """Leave out the step that was delivered or is under way; collective if under way.

        Raises:
            UnsupportedError: a server's rounds do not wait for all workers.
        """
        if self._averages is not None:
            self.undo()
        if not self.under_way:
            return
        if self.transport.quorum is not None:
            raise UnsupportedError(
                f"got discard() and a server with a quorum of {self.transport.quorum}, expected "
                "step(): the gradients may be in a round already; start the server without "
                "--quorum"
            )
        if self._config_checked and self._rows_known:  # else nothing was sent
            self._start_rest()
            self._finish(good=False)
        self._sparse.clear()
        self._release()

    def comes_in_rounds(self, *, scaled: bool) -> bool:
        """Whether a server's rounds do not wait for all workers; the first call is collective.

        Args:
            scaled: whether a GradScaler calls.

        Raises:
            UnsupportedError: rounds do not wait, and there is a loss scale.
        """
        self.begin()
        if self.transport.quorum is not None and (scaled or self.scaler is not None):
            raise UnsupportedError(
                f"got a grad_scaler and a server with a quorum of {self.transport.quorum}, "
                "expected one of them, because workers in different rounds have different scales; "
                "train with bfloat16, or start the server without --quorum"
            )
        return self.transport.quorum is not None

    def rounds(self) -> Iterator[None]:
        """`finish` for servers with a quorum: delivers one finished round per iteration.

        A round's aggregated gradient is in `p.grad` until the next iteration. Iterate to the end.
        """
        self._require_unchanged()
        self._in_sync.check(again=False)  # later, workers are in different rounds
        self._start_rest()
        require_untouched(self.buckets)
        found = self._finish_rounds()
        self._release()
        for directions in found:
            self._deliver(directions)
            self.step += 1
            yield
        self._sparse.clear()

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        self._hooks.remove()

    def state_dict(self) -> dict[str, Any]:
        """This rank's error-feedback state, what sends rows, and the weight decay's velocity."""
        decay = self.decay.state_dict(self.named_parameters())
        return {**super().state_dict(), "rows": dict(self._rows), "decay": decay}

    def describe_merged(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """See `StepDriver.describe_merged`; the rest is the same on all ranks."""
        decay = self.decay.state_dict(self.named_parameters())
        arrays = {name: velocity.float().cpu().numpy() for name, velocity in decay.items()}
        return {**super().describe_merged(parameters), "rows": dict(self._rows), "decay": arrays}

    def checkpoint(self) -> dict[str, Any]:
        """See `StepDriver.checkpoint`."""
        self.begin()
        return super().checkpoint()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `StepDriver.load_state_dict`."""
        self._require_own(state)
        decay = self.decay.loaded(state.get("decay", {}), self.named_parameters())
        rows, buckets = self._rows, self.buckets
        if not self._rows_known and state.get("rows"):
            rows = {n: state["rows"][n] for n, _ in self._trainable if n in state["rows"]}
            buckets = self._make_buckets(rows)
        self.step = load_state(state, buckets, self.method, self.transport)
        self._use(buckets, rows)
        self.decay = decay

    def forget(self) -> None:
        """See `StepDriver.forget`."""
        super().forget()
        self.decay = DecayVelocity(self.method)

    def _use(self, buckets: Sequence[Bucket], rows: dict[str, int]) -> None:
        self.buckets, self._rows = buckets, rows
        self._place = {slot.parameter: (b, slot) for b in buckets for slot in b.slots}

    def _agree_on_rows(self) -> None:
        """Before the first exchange, find the gradients to send as rows; collective.

        These are sparse on at least one rank. Gradients already taken go into the new buckets.
        Other parameters keep their state.
        """
        if self._rows_known:
            return
        rows, self._rows_known = agree(self._trainable, self._rows, self.transport)
        for name in rows:
            refuse_rows(self.method, name)
        if rows != self._rows:
            taken = {p: state for bucket in self.buckets for p, state in bucket.filled.items()}
            before = self.buckets
            self._use(self._make_buckets(rows), rows)
            move_state(before, self.buckets)
            for parameter, state in taken.items():
                bucket, slot = self._place[parameter]
                self._take(bucket, slot)
                bucket.filled[parameter] = state  # for `require_untouched`

    def _make_buckets(self, rows: dict[str, int]) -> list[Bucket]:
        return make_buckets(self._trainable, rows, self.options, self.transport)

    def use_scaler(self, scaler: torch.amp.GradScaler, scale: float) -> None:
        """From now on, gradients contain this scaler's scale; those already taken too.

        Args:
            scaler: one that was unknown before.
            scale: the factor that `p.grad` contains now.

        Raises:
            RuntimeError: gradients are under way to other ranks, with another scale.
        """
        if any(bucket.started for bucket in self.buckets):
            raise RuntimeError(
                "got a GradScaler that was not used in earlier steps while gradients are under way "
                "to other ranks, expected one GradScaler from the first step on; pass it as "
                "grad_scaler="
            )
        self.scaler, self._loss_scale = scaler, scale
        for bucket in self.buckets:
            for slot in bucket.slots:
                if slot.parameter in bucket.filled:
                    self._take(bucket, slot)

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        if self.is_stale():
            return  # `finish` takes the gradient, between the present ranks
        if self._averages is not None:
            self.keep() if self._averages.were_kept(parameter) else self.clear()
        self._passes_left[parameter] -= 1
        if self._passes_left[parameter] < 0:
            raise RuntimeError(
                f"got more than {self.options.passes} backward passes before step(), expected "
                f"{self.options.passes}; raise backward_passes_per_step to accumulate gradients"
            )
        if self._passes_left[parameter] > 0:
            return
        if not self.under_way:
            self._loss_scale = self._scale_now()
        bucket, slot = self._place[parameter]
        self._take(bucket, slot)
        full = len(bucket.filled) == len(bucket.slots)
        if full and self.options.overlap and self._config_checked and self._rows_known:
            self._start_full(bucket)

    def _start_full(self, bucket: Bucket) -> None:
        """Send a full bucket, or all that its place in the order allows."""
        if not self.transport.in_order:
            bucket.start(self.step)
            return
        for each in in_order(self.buckets):
            if len(each.filled) < len(each.slots):
                return
            if not each.started:
                each.start(self.step)

    def _start_rest(self) -> None:
        """Send the buckets that are not yet under way."""
        for bucket in in_order(self.buckets):
            if not bucket.started:
                self._fill_rest(bucket)
                bucket.start(self.step)

    def _release(self) -> None:
        for bucket in self.buckets:
            bucket.release()
        self.reset_passes()

    def _deliver(
        self, directions: Sequence[torch.Tensor | None], *, unscaled: bool = False
    ) -> None:
        factor = 1.0 if unscaled else self._loss_scale
        factor *= 1 if self.options.average else self.transport.size
        for bucket, direction in zip(self.buckets, directions, strict=True):
            bucket.deliver(direction, factor)
        for parameter in self._sparse:
            parameter.grad = parameter.grad.to_sparse() if parameter.grad is not None else None

    def _fill_rest(self, bucket: Bucket) -> None:
        """Fill in parameters without a complete hook: no gradient, or fewer passes."""
        for slot in bucket.slots:
            if slot.parameter not in bucket.filled:
                self._take(bucket, slot)

    def _scale_now(self) -> float:
        return self.scaler.get_scale() if self.scaler is not None else 1.0

    def _take(self, bucket: Bucket, slot: Slot) -> None:
        gradient, in_place = slot.parameter.grad, self.scaler is None  # scalers write to gradients
        if gradient is None or not gradient.is_sparse or isinstance(bucket, RowsBucket):
            bucket.fill(slot, self._loss_scale, in_place=in_place)
        elif self.options.sparse_as_dense:
            slot.parameter.grad = gradient.to_dense()
            self._sparse.add(slot.parameter)
            bucket.fill(slot, self._loss_scale, in_place=in_place)
        elif self._rows_known:
            raise no_rows(slot.name, gradient, self.transport)
        else:
            bucket.filled[slot.parameter] = Taken.of(gradient)  # for `_agree_on_rows`

    def _require_unchanged(self) -> None:
        trained = [(slot.name, p) for p, (_, slot) in self._place.items()]
        require_unchanged(self._frozen, trained)
