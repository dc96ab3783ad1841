"""Buckets: which parameters are sent together, in which order, over which channel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ef_horovod.arrays import Array
from ef_horovod.exchange.channel import Channel
from ef_horovod.exchange.dense import UNCOMPRESSED
from ef_horovod.exchange.warmup import require_dense_steps
from ef_horovod.methods.base import Method
from ef_horovod.training.choice import Choice, decide
from ef_horovod.training.policy import DensePolicy, Parameter, method_of
from ef_horovod.transports.base import Transport

_NO_LIMIT = 1 << 62


class Slot(NamedTuple):
    """The place of a parameter's gradient in its bucket."""

    name: str
    parameter: Parameter
    start: int
    stop: int


class BucketPlan(NamedTuple):
    """A bucket before it is opened; without a method it is sent uncompressed."""

    name: str
    slots: list[Slot]
    method: Method | None
    dense_steps: int = 0  # before compression starts

    def decide(self, transport: Transport, exchange: str = "auto") -> Choice:
        """The bucket's exchange and method; see `choice.decide`."""
        method = self.method
        if method is not None:
            method = method.for_shapes([tuple(slot.parameter.shape) for slot in self.slots])
        return decide(exchange, method, self.length, transport, self.dense_steps)

    def open(
        self, like: Array, transport: Transport, *, exchange: str = "auto", seed: int = 0
    ) -> Channel:
        """A channel for the bucket, with vectors of the framework and device of `like`."""
        return self.decide(transport, exchange).open(self.name, like, transport, seed=seed)

    @property
    def length(self) -> int:
        """Number of elements."""
        return self.slots[-1].stop

    def apart(self) -> list[BucketPlan]:
        """One uncompressed bucket per parameter."""
        return [
            BucketPlan(f"{self.name}.{i}", one_slot(slot.name, slot.parameter), None)
            for i, slot in enumerate(self.slots)
        ]


def plan_buckets(
    named: Iterable[tuple[str, Parameter]],
    method: Method,
    *,
    dense: DensePolicy,
    bucket_bytes: int,
    device_of: Callable[[Parameter], Any],
    dense_steps: int = 0,
) -> list[BucketPlan]:
    """Buckets of parameters, last registered first: the order of gradients in backward.

    Args:
        named: (name, parameter) in the order of registration.
        method: for the compressed parameters.
        dense: selects the uncompressed parameters; they share one bucket per device. It may give
            others a method of their own; each method has its own buckets.
        bucket_bytes: bytes of float32 per compressed bucket; a larger parameter gets its own.
        device_of: device of a parameter; a bucket has parameters of one device.
        dense_steps: how many steps are uncompressed averages before compression starts.
    """
    by_method: dict[Method | None, list[tuple[str, Parameter]]] = {None: [], method: []}
    for name, p in named:
        by_method.setdefault(method_of(dense, name, p, method), []).append((name, p))
    for own in by_method:
        require_dense_steps(own, dense_steps)
    small = _pack(by_method.pop(None), _NO_LIMIT, device_of)
    plans = [BucketPlan(f"dense.{i}", s, method.uncompressed()) for i, s in enumerate(small)]
    packed = [
        (own, slots)
        for own, parameters in by_method.items()
        for slots in _pack(parameters, bucket_bytes, device_of)
    ]
    return plans + [
        BucketPlan(f"bucket.{i}", slots, own, dense_steps) for i, (own, slots) in enumerate(packed)
    ]


def plan_one(
    bucket: str,
    named: tuple[str, Parameter],
    method: Method,
    *,
    dense: DensePolicy,
    dense_steps: int = 0,
) -> BucketPlan:
    """The bucket of a single parameter.

    Args:
        bucket: its name.
        named: name, as the policy knows it, and parameter.
        method, dense, dense_steps: as in `plan_buckets`.
    """
    own, slots = method_of(dense, *named, method), one_slot(bucket, named[1])
    require_dense_steps(own, dense_steps)
    if own is None:
        return BucketPlan(bucket, slots, method.uncompressed())
    return BucketPlan(bucket, slots, own, dense_steps)


def describe(buckets: Iterable[Any]) -> list[str]:
    """One line per parameter that must be equal on all ranks; for `require_same_config`."""
    return [
        f"parameter '{slot.name}' of shape {tuple(slot.parameter.shape)} in "
        f"{bucket.channel.name} by {bucket.channel.method!r} ({bucket.channel.exchange.name})"
        for bucket in buckets
        for slot in bucket.slots
    ]


def own_methods(buckets: Iterable[Any], method: Method) -> dict[str, Method]:
    """{parameter name: its method}, where a policy gave it another one than the usual `method`."""
    usual = {repr(one) for one in (method, method.uncompressed(), UNCOMPRESSED)}
    return {
        slot.name: bucket.channel.method
        for bucket in buckets
        if repr(bucket.channel.method) not in usual
        for slot in bucket.slots
    }


def one_slot(name: str, parameter: Parameter) -> list[Slot]:
    """The slots of a bucket with a single parameter."""
    return [Slot(name, parameter, 0, math.prod(parameter.shape))]


def _pack(
    named: list[tuple[str, Parameter]], bucket_bytes: int, device_of: Callable[[Parameter], Any]
) -> list[list[Slot]]:
    packed: list[list[Slot]] = []
    for name, parameter in reversed(named):
        size = math.prod(parameter.shape)
        last = packed[-1] if packed else None
        if (
            last is None
            or 4 * (last[-1].stop + size) > bucket_bytes
            or device_of(last[-1].parameter) != device_of(parameter)
        ):
            last = []
            packed.append(last)
        start = last[-1].stop if last else 0
        last.append(Slot(name, parameter, start, start + size))
    return packed
