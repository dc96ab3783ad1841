"""`ef.ddp_hook`: error feedback in the buckets of torch's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.stats import ChannelStats, total_stats
from ef_horovod.methods.base import Method
from ef_horovod.torch.buckets import Bucket
from ef_horovod.torch.parameters import pairs_of
from ef_horovod.training.buckets import plan_buckets
from ef_horovod.training.choice import wants_server
from ef_horovod.training.driver import StepDriver
from ef_horovod.training.options import check_options
from ef_horovod.training.policy import (
    DensePolicy,
    require_answers,
    require_distinct,
    require_method,
    small_or_vector,
    warn_of_surprises,
)
from ef_horovod.training.state import load_state, read_state, write_state
from ef_horovod.transports.base import Transport
from ef_horovod.transports.torch_distributed import TorchDistributed

_NO_LIMIT = 1 << 62  # DDP has made the buckets


def ddp_hook(
    compression: Method,
    model: Any,
    *,
    dense: DensePolicy = small_or_vector,
    exchange: str = "auto",
    seed: int = 0,
    dense_steps: int = 0,
    grad_scaler: torch.amp.GradScaler | None = None,
    group: Any = None,
    timeout: float | None = None,
) -> tuple[DDPState, Any]:
    """State and hook for `model.register_comm_hook`; collective.

    DDP goes on to call the hook in each backward pass that synchronizes, bucket by bucket. A bucket
    is compressed and sent when its gradients are ready. `p.grad` becomes the average, as in dense
    DDP, so clipping, accumulation under `no_sync()` and any optimizer work as they do there.

    If a gradient of a bucket is not finite on any rank, the bucket's gradients are NaN on all
    ranks, as in dense DDP, and its error-feedback state is as it was. Leave out the optimizer's
    step then, as a `torch.amp.GradScaler` does. With a GradScaler, pass it, so that error-feedback
    state is kept in unscaled units.

    Args:
        compression: error-feedback method with its compressor.
        model: the `DistributedDataParallel` model, for names.
        dense: `dense(name, parameter)` says which parameters stay uncompressed, or returns a method
            for it.
        exchange: "auto", "auto:NETWORK", "gather", "reduce", "double_pass" or "hierarchical".
        seed: of random compressors.
        dense_steps: number of first steps that send uncompressed averages.
        grad_scaler: the scaler of the loss.
        group: process group; default that of the model.
        timeout: seconds that a wait for other ranks may take; default $EF_HOROVOD_TIMEOUT or 300.

    Returns:
        The state, which has `state_dict()`, `load_state_dict()` and `stats()`; and the hook.

    Raises:
        UnsupportedError: the combination cannot work; the message names an alternative.
        ValueError: a number is out of range.

    Example:
        model = torch.nn.parallel.DistributedDataParallel(model)
        model.register_comm_hook(*ef.ddp_hook(ef.ErrorFeedback(ef.OneBit()), model))
    """
    check_options(
        "ddp_hook", dense=dense, exchange=exchange, seed=seed, dense_steps=dense_steps,
        timeout=timeout,
    )  # fmt: skip
    method = require_method(compression)
    if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise UnsupportedError(
            f"ddp_hook got {type(model).__name__}, expected a DistributedDataParallel model, "
            "because FSDP and ZeRO send parts of gradients, each to one rank; for plain models "
            "take ef.DistributedOptimizer with transport='torch'"
        )
    if method.sgd_momentum is not None or method.makes_updates:
        raise UnsupportedError(
            f"ddp_hook got {method!r}, which does a part of the optimizer's work, expected a "
            "method of gradients alone, because DDP does not know the optimizer; take "
            "ef.DistributedOptimizer with transport='torch'"
        )
    _require_dense_gradients(model.module)
    named = [(name, p) for name, p in pairs_of(model.module) if p.requires_grad]
    named = require_distinct(named)
    require_answers(named, dense, method)
    transport = TorchDistributed(model.process_group if group is None else group, timeout)
    if transport.has_server or wants_server(exchange):
        raise UnsupportedError(
            f"ddp_hook got exchange={exchange!r}, expected one between ranks, because DDP's ranks "
            "have no servers; take ef.DistributedOptimizer in a job by launch/server"
        )
    warn_of_surprises(named, method, dense, transport.rank)
    options = {"dense": dense, "dense_steps": dense_steps}
    scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
    return DDPState(method, transport, named, exchange, seed, scaler, options), _hook


def _require_dense_gradients(module: torch.nn.Module) -> None:
    """Refuse sparse embeddings: DDP gives a hook no part of their gradients."""
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Embedding | torch.nn.EmbeddingBag) and part.sparse:
            raise UnsupportedError(
                f"ddp_hook got {name!r}, an embedding with sparse gradients, expected dense ones, "
                "because DDP gives its hooks no rows; build it with sparse=False, or take "
                "ef.DistributedOptimizer with transport='torch'"
            )


class DDPState(StepDriver[Bucket]):
    """Error-feedback state by parameter name, whatever buckets DDP makes.

    The constructor's arguments are those of `ddp_hook`, which makes it.
    """

    def __init__(
        self, method: Method, transport: Transport, named: list[tuple[str, torch.Tensor]],
        exchange: str, seed: int, scaler: torch.amp.GradScaler | None, options: dict[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(method, transport)
        self._names = {p: name for name, p in named}
        self._exchange, self._seed, self._scaler, self._options = exchange, seed, scaler, options
        self._groups: dict[tuple[str, ...], list[Bucket]] = {}  # by the names in DDP's bucket
        self._under_way: list[_Sent] = []
        self._saved: dict[str, Any] = {}  # of parameters that have no bucket yet
        self._earlier: list[ChannelStats] = []  # of buckets that DDP made anew

    def send(self, given: Any) -> torch.futures.Future[torch.Tensor]:
        """Send a bucket of DDP's (`dist.GradBucket`); the last one's call waits for all."""
        parameters, parts = given.parameters(), given.gradients()
        buckets = self._buckets_of(parameters)
        scale = self._scaler.get_scale() if self._scaler is not None else 1.0
        gradients = dict(zip(parameters, parts, strict=True))
        for bucket in buckets:
            for slot in bucket.slots:
                target = bucket.channel.gradient[slot.start : slot.stop]
                target.copy_(gradients[slot.parameter].reshape(-1))
                if scale != 1.0:
                    target.div_(scale)
            bucket.start(self._steps_done())
        sent = _Sent(given.buffer(), gradients, buckets, scale)
        self._under_way.append(sent)
        if given.is_last():
            self._finish_all()
        return sent.future

    def _finish_all(self) -> None:
        step = self._steps_done()
        for sent in self._under_way:  # each for itself: DDP may let go of a bucket when it is done
            directions = self._finish(sent.buckets)
            sent.deliver(directions)
        self._under_way = []
        self._set_step(step + 1)

    def _buckets_of(self, parameters: Iterable[torch.Tensor]) -> list[Bucket]:
        """Our buckets for one of DDP's; new ones take over the state of their parameters."""
        named = [(self._names[p], p) for p in parameters]
        key = tuple(name for name, _ in named)
        if key not in self._groups:
            self._make_room(set(key))
            self._groups[key] = self._opened(named)
            self.buckets = [bucket for group in self._groups.values() for bucket in group]
            self._compare([f"exchange={self._exchange!r}, seed={self._seed}, {len(key)} in bucket"])
        return self._groups[key]

    def _make_room(self, names: set[str]) -> None:
        """Keep the state of buckets that had some of these parameters, and close them."""
        for key in [key for key in self._groups if names & set(key)]:
            closed = self._groups.pop(key)
            self._saved |= read_state(closed)
            self._earlier += [bucket.channel.stats() for bucket in closed]

    def _opened(self, named: list[tuple[str, torch.Tensor]]) -> list[Bucket]:
        plans = plan_buckets(
            # DDP's order is that of backward, which the plan turns round.
            list(reversed(named)),
            self.method,
            bucket_bytes=_NO_LIMIT,
            device_of=lambda p: p.device,
            **self._options,
        )
        buckets = [
            Bucket.open(plan, plan.decide(self.transport, self._exchange), self.transport,
                        seed=self._seed)
            for plan in plans
        ]  # fmt: skip
        kept = read_state(buckets)
        if kept.keys() <= self._saved.keys():
            write_state(buckets, {name: self._saved.pop(name) for name in kept})
        return buckets

    def stats(self) -> list[ChannelStats]:
        """One row per bucket, then the total; those that DDP made anew count in the total."""
        rows = [channel.stats() for channel in self._channels()]
        return [*rows, total_stats([*rows, *self._earlier])]

    def state_dict(self) -> dict[str, Any]:
        """This rank's error-feedback state by parameter name; save one file per rank."""
        state = super().state_dict()
        return state | {"parameters": self._saved | state["parameters"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`, from the same rank of an equal job.

        Raises:
            ValueError: the rank, number of ranks, method or model differs.
        """
        self._require_own(state)
        # A check of the facts; the parameters follow when DDP shows its buckets.
        self._set_step(load_state(state | {"parameters": {}, "methods": {}}, [], self.method,
                                  self.transport))  # fmt: skip
        unknown = state["parameters"].keys() - set(self._names.values())
        if unknown:
            raise ValueError(
                f"got error-feedback state of '{min(unknown)}', which the model has not, expected "
                "that of an equal model; load it into the same model, or start without it"
            )
        self._groups, self.buckets = {}, []
        self._saved = dict(state["parameters"])


class _Sent:
    """One of DDP's buckets under way."""

    def __init__(
        self, buffer: torch.Tensor, gradients: dict[torch.Tensor, torch.Tensor],
        buckets: list[Bucket], scale: float,
    ) -> None:  # fmt: skip
        self._buffer, self._gradients, self._scale = buffer, gradients, scale
        self.buckets = buckets
        devices: list[int | str | torch.device] = [buffer.device] if buffer.is_cuda else []
        self.future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)

    def deliver(self, directions: list[torch.Tensor] | None) -> None:
        """Write the averages into DDP's buffer, in its dtype; NaN for a dropped bucket."""
        if directions is None:
            self._buffer.fill_(float("nan"))
        for bucket, direction in zip(self.buckets, directions or (), strict=False):
            for slot in bucket.slots:
                part = direction[slot.start : slot.stop].view(slot.parameter.shape)
                self._gradients[slot.parameter].copy_(part * self._scale)
        for bucket in self.buckets:
            bucket.release()
        self.future.set_result(self._buffer)


def _hook(state: DDPState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    return state.send(bucket)


# DDP looks at these, and reads no annotations that are text.
_hook.__annotations__.update(
    bucket=dist.GradBucket, **{"return": torch.futures.Future[torch.Tensor]}
)
