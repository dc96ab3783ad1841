"""From gradient hooks to averaged gradients: one step of all buckets.

A bucket's exchange starts as soon as the last of its gradients exists, while backward goes on.
Nothing of a step is committed before all buckets have arrived, so that a NaN on any rank drops the
whole step on all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ef_horovod.buckets import BucketPlan, Slot, describe, plan_buckets
from ef_horovod.channel import ChannelStats, finish_rounds, finish_step, total_stats
from ef_horovod.errors import UnsupportedError
from ef_horovod.guard import require_same_config
from ef_horovod.memories import load_memories, load_state, save_memories, save_state
from ef_horovod.methods.base import Method
from ef_horovod.policy import DensePolicy
from ef_horovod.torch.buckets import Bucket, state_of
from ef_horovod.torch.rows import RowsBucket, agree, changed, kind_of
from ef_horovod.torch.sync import SyncCheck
from ef_horovod.transports.base import Transport

Named = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Options:
    """How gradients are reduced; equal on all ranks.

    Args:
        method: for the compressed buckets.
        dense: policy that says which parameters stay uncompressed; they share one allreduce.
        exchange: "auto", "auto:NETWORK", "gather", "reduce" or "double_pass".
        bucket_bytes: size of a compressed bucket in bytes of float32.
        passes: backward passes that are accumulated before an exchange.
        seed: of random compressors.
        average: deliver means over ranks, or sums.
        sparse_as_dense: whether sparse gradients are densified; they travel as rows otherwise.
        overlap: start exchanges during backward, or all of them in `finish`; the first step's are
            never started before `finish`, where the config is checked.
        scaled: whether gradients come multiplied by a loss scale.
        check_sync: whether ranks' parameters are compared; see `SyncCheck`.
    """

    method: Method
    dense: DensePolicy
    exchange: str
    bucket_bytes: int
    passes: int
    seed: int
    average: bool
    sparse_as_dense: bool
    overlap: bool
    scaled: bool
    check_sync: bool


class Reducer:
    """Averages gradients over ranks, compressed; hooks itself to the parameters.

    Args:
        trainable: parameters with their names, equal on all ranks.
        frozen: parameters that must not start to require a gradient.
        options: see there.
        transport: to the other ranks.
        loss_scale: asked once a step for what gradients are multiplied by; memories stay in
            unscaled units.
    """

    def __init__(
        self,
        trainable: Named,
        frozen: Named,
        options: Options,
        transport: Transport,
        loss_scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.options, self.transport = options, transport
        self.step = 0  # number of the next step; a dropped step's number is used again
        self._frozen = frozen
        self._read_loss_scale, self._loss_scale = loss_scale, 1.0
        self._config_checked = False
        parameters = [p for _, p in [*trainable, *frozen]]
        self._in_sync = SyncCheck(parameters, transport, options.check_sync)
        self._sparse: set[torch.Tensor] = set()  # densified in this step
        self._trainable = trainable
        # Which parameters travel as rows is known when all ranks have their first gradients.
        self._rows_known = options.sparse_as_dense or transport.has_server
        self._use(self._make_buckets({}), {})
        self._require_free()
        self.reset_passes()
        # Weak: a model must not keep the reducer of a forgotten optimizer at work.
        hook = _weak(self._on_gradient)
        self._hooks = [p.register_post_accumulate_grad_hook(hook) for p in self._place]
        _live.add(self)

    @property
    def under_way(self) -> bool:
        """Whether gradients of a step have been taken that `finish` has not delivered."""
        return any(bucket.filled for bucket in self.buckets)

    def named_parameters(self) -> list[tuple[torch.Tensor, str]]:
        """All parameters whose gradients are averaged, with their names."""
        return [(parameter, slot.name) for parameter, (_, slot) in self._place.items()]

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

    def finish(self) -> bool:
        """Send what is not yet under way, wait, and put the directions into `p.grad`.

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
        self._agree_on_rows()
        self._start_rest()
        directions = finish_step([bucket.channel for bucket in self.buckets])
        self._release()
        self._deliver(directions or [None] * len(self.buckets))
        self._sparse.clear()
        self.step += directions is not None
        return directions is not None

    def comes_in_rounds(self) -> bool:
        """Whether a server's rounds do not wait for all workers; the first call is collective.

        Raises:
            UnsupportedError: they do not, and there is a loss scale.
        """
        self.begin()
        if self.transport.quorum is not None and self.options.scaled:
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
        found = finish_rounds([bucket.channel for bucket in self.buckets], self.transport)
        self._release()
        for directions in found:
            self._deliver(directions)
            self.step += 1
            yield
        self._sparse.clear()

    def close(self) -> None:
        """Leave the parameters alone from now on."""
        for hook in self._hooks:
            hook.remove()
        _live.discard(self)

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
                bucket.fill(slot, self._loss_scale)
                bucket.filled[parameter] = state  # with which `release` compares

    def _make_buckets(self, rows: dict[str, int]) -> list[Bucket]:
        """All buckets; parameters that travel as rows have one each."""
        named, options = dict(self._trainable), self.options
        plans = plan_buckets(
            [(name, parameter) for name, parameter in named.items() if name not in rows],
            options.method,
            dense=options.dense,
            bucket_bytes=options.bucket_bytes,
            device_of=lambda parameter: parameter.device,
        )
        dense = [bucket for plan in plans for bucket in self._open(plan)]
        return dense + [RowsBucket(n, named[n], dims, self.transport) for n, dims in rows.items()]

    def _open(self, plan: BucketPlan) -> list[Bucket]:
        """A bucket; one for each parameter where nothing is compressed, for which none is copied.

        Small parameters have one allreduce all the same.
        """
        options = self.options
        bucket = Bucket.open(plan, self.transport, exchange=options.exchange, seed=options.seed)
        if plan.method is None or bucket.channel.exchange != "dense":
            return [bucket]
        singles = plan.apart()
        return [
            Bucket.open(p, self.transport, exchange="dense", seed=options.seed) for p in singles
        ]

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        self._passes_left[parameter] -= 1
        if self._passes_left[parameter] < 0:
            raise RuntimeError(
                f"got more than {self.options.passes} backward passes before step(), expected "
                f"{self.options.passes}; raise backward_passes_per_step to accumulate gradients"
            )
        if self._passes_left[parameter] > 0:
            return
        bucket, slot = self._place[parameter]
        self._fill(bucket, slot)
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

    def _deliver(self, directions: Sequence[torch.Tensor | None]) -> None:
        factor = self._loss_scale * (1 if self.options.average else self.transport.size)
        for bucket, direction in zip(self.buckets, directions, strict=True):
            bucket.deliver(direction, factor)
        for parameter in self._sparse:
            parameter.grad = parameter.grad.to_sparse() if parameter.grad is not None else None

    def _fill_rest(self, bucket: Bucket) -> None:
        """What no hook has brought: parameters without a gradient, or with fewer passes."""
        for slot in bucket.slots:
            if slot.parameter not in bucket.filled:
                self._fill(bucket, slot)

    def _fill(self, bucket: Bucket, slot: Slot) -> None:
        if not self.under_way:
            self._loss_scale = self._read_loss_scale()
        gradient = slot.parameter.grad
        if gradient is None or not gradient.is_sparse or isinstance(bucket, RowsBucket):
            bucket.fill(slot, self._loss_scale)
        elif self.options.sparse_as_dense:
            slot.parameter.grad = gradient.to_dense()
            self._sparse.add(slot.parameter)
            bucket.fill(slot, self._loss_scale)
        elif self._rows_known:
            raise self._no_rows(slot.name, gradient)
        else:
            bucket.filled[slot.parameter] = state_of(gradient)  # to be taken by `_agree_on_rows`

    def _no_rows(self, name: str, gradient: torch.Tensor) -> UnsupportedError:
        if not self.transport.has_server:
            return changed(name, "dense", kind_of(gradient))
        return UnsupportedError(
            f"the gradient of '{name}' is sparse with exchange='server', expected a dense one, "
            "because servers know no rows; pass sparse_as_dense=True"
        )

    def _describe(self) -> list[str]:
        options = self.options
        return [
            f"compression {options.method!r}",
            f"exchange={options.exchange!r}, seed={options.seed}, average={options.average}, "
            f"backward_passes_per_step={options.passes}, grad_scaler={options.scaled}, "
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

    def _require_free(self) -> None:
        for other in _live:
            for parameter, (_, slot) in self._place.items():
                if parameter in other._place:
                    raise UnsupportedError(
                        f"the gradient of '{slot.name}' is averaged by another wrapped optimizer "
                        "already, expected one; call unwrap() on the other one first"
                    )


_live: weakref.WeakSet[Reducer] = weakref.WeakSet()


def _weak(method: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
    """A function that calls a bound method for as long as its object lives."""
    reference = weakref.WeakMethod(method)

    def call(parameter: torch.Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive(parameter)

    return call
