"""From gradient hooks to averaged gradients: one step of all buckets.

A bucket's exchange starts as soon as the last of its gradients exists, while backward goes on.
Nothing of a step is committed before all buckets have arrived, so that a NaN on any rank drops the
whole step on all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.channel import ChannelStats, finish_step, total_stats
from ef_horovod.exchange.config_check import require_same_config
from ef_horovod.exchange.server import finish_rounds
from ef_horovod.torch.averages import Averages
from ef_horovod.torch.buckets import Bucket, Taken, require_untouched
from ef_horovod.torch.hooks import GradientHooks
from ef_horovod.torch.options import Options
from ef_horovod.torch.rows import RowsBucket, agree, make_buckets, no_rows
from ef_horovod.torch.sync import SyncCheck
from ef_horovod.training.buckets import Slot, describe
from ef_horovod.training.state import load_memories, load_state, remember, save_memories, save_state
from ef_horovod.transports.base import Transport

Named = list[tuple[str, torch.Tensor]]


class Reducer:
    """Averages gradients over ranks, compressed; hooks itself to the parameters.

    Args:
        trainable: parameters with their names, equal on all ranks.
        frozen: parameters that must not start to require a gradient.
        options: see there.
        transport: to the other ranks.
        scaler: of the loss that gradients come from, so that error-feedback state is kept in
            unscaled units.
        others: frozen parameters that are not the optimizer's, for `SyncCheck`.
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
        self.options, self.transport = options, transport
        self.step = 0  # number of the next step; a dropped step's number is used again
        self._frozen = frozen
        self.scaler, self._loss_scale = scaler, 1.0
        self._averages: Averages | None = None  # delivered, not yet applied
        self._config_checked = False
        parameters = [p for _, p in [*trainable, *frozen]]
        self._in_sync = SyncCheck(parameters, transport, options.check_sync, others)
        self._sparse: set[torch.Tensor] = set()  # densified in this step
        self._trainable = trainable
        # Which parameters travel as rows is known when all ranks have their first gradients.
        self._rows_known = options.sparse_as_dense or transport.has_server
        self._use(self._make_buckets({}), {})
        self.reset_passes()
        self._hooks = GradientHooks(dict(self.named_parameters()), self._on_gradient)

    @property
    def under_way(self) -> bool:
        """Whether gradients of a step have been taken that `finish` has not delivered."""
        return any(bucket.filled for bucket in self.buckets)

    def named_parameters(self) -> list[tuple[torch.Tensor, str]]:
        """All parameters whose gradients are averaged, with their names."""
        return [(parameter, slot.name) for parameter, (_, slot) in self._place.items()]

    @property
    def has_memory(self) -> bool:
        """Whether anything of a gradient is remembered between steps."""
        return remember(self.buckets)

    def reset_passes(self) -> None:
        """Count backward passes from the start."""
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
        """Before the first exchange: see that all ranks mean the same, and servers too; collective.

        Not in a hook, for ranks run hooks in their own order.
        """
        if not self._config_checked:
            require_same_config(self.transport, self._describe())
            facts = describe(self.buckets)
            self.transport.handshake(facts, self.step, several_rounds=True)
            self._config_checked = True

    def finish(self, *, undoable: bool = False, scale: float | None = None) -> bool:
        """Send what is not yet under way, wait, and put the averages into `p.grad`.

        Args:
            undoable: whether the step may still be left out: `undo`, or `keep`.
            scale: where a GradScaler calls: what it has left gradients multiplied by. Averages come
                without a loss scale then.

        Returns:
            Whether the step is good. If some rank's gradient was not finite, all ranks return
            False, memories are as before, and all gradients are NaN so that nobody uses them.

        Raises:
            UnsupportedError: a server's rounds do not wait for all workers; take `rounds`.
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
        self._in_sync.check()
        if scale is not None:
            self._loss_scale = scale
        elif not self.under_way:
            self._loss_scale = self._scale_now()
        self._agree_on_rows()
        self._start_rest()
        if scale is None:
            require_untouched(self.buckets)
        channels = [bucket.channel for bucket in self.buckets]
        directions = finish_step(channels, undoable=undoable)
        self._release()
        self._deliver(directions or [None] * len(self.buckets), unscaled=scale is not None)
        self._sparse.clear()
        good = directions is not None
        self.step += good
        if good and undoable:
            self._averages = Averages(self._place)
        return good

    @property
    def undoable(self) -> bool:
        """Whether averages were delivered that were neither applied nor left out."""
        return self._averages is not None

    def keep(self) -> None:
        """The averages were applied, or went into the next gradient."""
        self._averages = None

    def clear(self) -> None:
        """Averages are cleared: that leaves the step out, unless parameters were changed by them.

        It is so with an update by hand, or by the optimizer inside of another one.
        """
        if self._averages is not None:
            self.keep() if self._averages.were_applied() else self.undo()

    def undo(self) -> None:
        """Leave out the step whose averages were delivered: states are as before it."""
        for bucket in self.buckets:
            bucket.channel.undo()
        self.step -= 1
        self._averages = None

    def leave_out(self) -> None:
        """Leave out the step that was delivered, or one that is under way; then collective.

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
        if self._config_checked and self._rows_known:  # otherwise nothing was sent
            self._start_rest()
            finish_step([bucket.channel for bucket in self.buckets], good=False)
        self._sparse.clear()
        self._release()

    def comes_in_rounds(self, *, scaled: bool) -> bool:
        """Whether a server's rounds do not wait for all workers; the first call is collective.

        Args:
            scaled: whether a GradScaler calls.

        Raises:
            UnsupportedError: they do not, and there is a loss scale.
        """
        self.begin()
        if self.transport.quorum is not None and (scaled or self.scaler is not None):
            raise UnsupportedError(
                f"got a grad_scaler and a server with a quorum of {self.transport.quorum}, "
                "expected one of them, for the scales of workers in different rounds differ; "
                "train with bfloat16, or start the server without --quorum"
            )
        return self.transport.quorum is not None

    def rounds(self) -> Iterator[None]:
        """`finish` for servers with a quorum: the directions of one round after the other.

        Each of them is in `p.grad` until the next one is asked for; ask for all of them.
        """
        self._require_unchanged()
        self._in_sync.check(again=False)  # later on workers are in different rounds
        self._start_rest()
        require_untouched(self.buckets)
        found = finish_rounds([bucket.channel for bucket in self.buckets], self.transport)
        self._release()
        for directions in found:
            self._deliver(directions)
            self.step += 1
            yield
        self._sparse.clear()

    def close(self) -> None:
        """Leave the parameters alone from now on."""
        self._hooks.remove()

    def stats(self) -> list[ChannelStats]:
        """One row a bucket and a total; call it between steps."""
        rows = [bucket.channel.stats() for bucket in self.buckets]
        return [*rows, total_stats(rows)]

    def state_dict(self) -> dict[str, Any]:
        """This rank's memories."""
        state = save_state(self.buckets, self.step, repr(self.options.method), self.transport)
        return {**state, "rows": dict(self._rows)}

    def checkpoint(self) -> dict[str, Any]:
        """The same after the servers, if there are any, have written theirs; collective."""
        self.begin()
        self.transport.save(self.step)
        return self.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned on this rank of an equal job."""
        rows, buckets = self._rows, self.buckets
        if not self._rows_known and state.get("rows"):
            rows = {n: state["rows"][n] for n, _ in self._trainable if n in state["rows"]}
            buckets = self._make_buckets(rows)
        self.step = load_state(state, buckets, repr(self.options.method), self.transport)
        self._use(buckets, rows)

    def _use(self, buckets: list[Bucket], rows: dict[str, int]) -> None:
        self.buckets, self._rows = buckets, rows
        self._place = {slot.parameter: (b, slot) for b in buckets for slot in b.slots}

    def _agree_on_rows(self) -> None:
        """Before the first exchange: rows for what has a sparse gradient on any rank; collective.

        What was taken already goes into the new buckets; error memories of the rest stay.
        """
        if self._rows_known:
            return
        rows, self._rows_known = agree(self._trainable, self._rows, self.transport)
        if rows != self._rows:
            taken = {p: state for bucket in self.buckets for p, state in bucket.filled.items()}
            memories = save_memories(self.buckets)
            self._use(self._make_buckets(rows), rows)
            load_memories(self.buckets, {n: m for n, m in memories.items() if n not in rows})
            for parameter, state in taken.items():
                bucket, slot = self._place[parameter]
                self._take(bucket, slot)
                bucket.filled[parameter] = state  # with which `require_untouched` compares

    def _make_buckets(self, rows: dict[str, int]) -> list[Bucket]:
        return make_buckets(self._trainable, rows, self.options, self.transport)

    def use_scaler(self, scaler: torch.amp.GradScaler, scale: float) -> None:
        """Take gradients as multiplied by its scale from now on, those taken already too.

        Args:
            scaler: that was not known before.
            scale: what is in `p.grad` is multiplied by it now.

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
            bucket.start(self.step)

    def _start_rest(self) -> None:
        """Send what is not yet under way."""
        for bucket in self.buckets:
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
        if not self.options.average:
            factor *= self.transport.size
        for bucket, direction in zip(self.buckets, directions, strict=True):
            bucket.deliver(direction, factor)
        for parameter in self._sparse:
            parameter.grad = parameter.grad.to_sparse() if parameter.grad is not None else None

    def _fill_rest(self, bucket: Bucket) -> None:
        """What no hook has brought: parameters without a gradient, or with fewer passes."""
        for slot in bucket.slots:
            if slot.parameter not in bucket.filled:
                self._take(bucket, slot)

    def _scale_now(self) -> float:
        return self.scaler.get_scale() if self.scaler is not None else 1.0

    def _take(self, bucket: Bucket, slot: Slot) -> None:
        gradient, in_place = slot.parameter.grad, self.scaler is None  # which writes to gradients
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

    def _describe(self) -> list[str]:
        options = self.options
        return [
            f"compression {options.method!r}",
            f"exchange={options.exchange!r}, seed={options.seed}, average={options.average}, "
            f"backward_passes_per_step={options.passes}, grad_scaler={self.scaler is not None}, "
            f"check_sync={options.check_sync}, sparse_as_dense={options.sparse_as_dense}",
            *describe(self.buckets),
        ]

    def _require_unchanged(self) -> None:
        thawed = [name for name, p in self._frozen if p.requires_grad]
        frozen = [slot.name for p, (_, slot) in self._place.items() if not p.requires_grad]
        for names, now in ((thawed, "requires a gradient"), (frozen, "requires no gradient")):
            if names:
                raise UnsupportedError(
                    f"parameter '{names[0]}' {now} now, unlike when the optimizer was wrapped, "
                    "expected no change; call optimizer.unwrap() and wrap the optimizer again"
                )
