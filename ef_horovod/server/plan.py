"""The config that workers and servers agree on, and the assignment of buckets to servers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from ef_horovod.compressors.identity import Identity
from ef_horovod.errors import ConfigMismatchError, EFHorovodError, PayloadError
from ef_horovod.exchange.config_check import first_difference
from ef_horovod.methods.base import Method
from ef_horovod.methods.no_feedback import NoFeedback
from ef_horovod.methods.parsing import read_method
from ef_horovod.server.protocol import fingerprint


class BucketSpec(NamedTuple):
    """A bucket, as both sides know it."""

    name: str
    length: int  # elements of float32
    method: str  # written by `parsing.write_method`
    seed: int
    workers: tuple[int, ...] = ()  # that send it; () for all

    def make_method(self) -> Method:
        """The method object."""
        return read_method(self.method)

    def senders(self, workers: int) -> list[int]:
        """The workers that send it, out of all."""
        return list(self.workers or range(workers))

    def __str__(self) -> str:
        senders = f" from workers {list(self.workers)}" if self.workers else ""
        return (
            f"bucket '{self.name}' of {self.length} elements by {self.method} with seed "
            f"{self.seed}{senders}"
        )


class Config(NamedTuple):
    """The content of a worker's first message."""

    buckets: tuple[BucketSpec, ...]
    facts: tuple[str, ...] = ()  # one line each: names and shapes of parameters
    step: int = 0  # of the first exchange

    def lines(self) -> list[str]:
        """The config as lines, one per fact; must be equal on all workers."""
        by_nodes = any(spec.workers for spec in self.buckets)
        how = " by nodes (exchange='hierarchical:server')" if by_nodes else ""
        return [
            f"{len(self.buckets)} buckets{how} and the next step {self.step}",
            *map(str, self.buckets),
            *self.facts,
        ]

    @property
    def fingerprint(self) -> int:
        """64-bit hash of the config without the step."""
        return fingerprint(self._replace(step=0).lines())

    def to_json(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The inverse of `to_json`.

        Raises:
            PayloadError: the text is something else.
        """
        try:
            fields = json.loads(text)
            specs = [(*spec, tuple(senders)) for *spec, senders in fields["buckets"]]
            buckets = tuple(BucketSpec._make(spec) for spec in specs)
            return cls(buckets, tuple(fields["facts"]), int(fields["step"]))
        except (ValueError, KeyError, TypeError) as error:
            raise PayloadError(
                f"a worker's first message is no config ({error!r}), expected one in JSON; "
                "install the same ef_horovod on all ranks"
            ) from None


def require_agreement(configs: Sequence[Config], method: Method | None) -> None:
    """Compare the workers' configs with each other and with the server.

    Args:
        configs: of the workers, in their order.
        method: the server's, or None if it takes the workers'.

    Raises:
        ConfigMismatchError: two sides differ, which the message names; or a method is unknown here.
    """
    for spec in configs[0].buckets:
        _require_known(spec)
    lines = [config.lines() for config in configs]
    for worker, other in enumerate(lines):
        if other != lines[0]:
            here, there = first_difference(lines[0], other)
            raise _mismatch(f"worker 0 has {here} and worker {worker} has {there}")
    if method is None:
        return
    uncompressed = repr(method.uncompressed()), repr(NoFeedback(Identity()))
    for spec in configs[0].buckets:
        theirs = repr(spec.make_method())
        if theirs != repr(method) and theirs not in uncompressed:
            raise _mismatch(
                f"the server has {method!r} and the workers have {theirs} for '{spec.name}'"
            )


def _require_known(spec: BucketSpec) -> None:
    try:
        spec.make_method()
    except (ValueError, EFHorovodError) as error:
        raise ConfigMismatchError(
            f"the workers have {spec.method} for '{spec.name}', expected a method that the server "
            f"can read ({error}); start servers with --import and the package that defines it"
        ) from None


def _mismatch(what: str) -> ConfigMismatchError:
    return ConfigMismatchError(
        f"{what}, expected the same on all ranks; give all workers and servers the same model, the "
        "same compression and checkpoints of the same step"
    )


def assign(buckets: Sequence[BucketSpec], servers: int) -> list[int]:
    """The server of each bucket, balanced by traffic in bytes.

    Buckets are not split, so that results do not depend on the number of servers.

    Example:
        >>> spec = BucketSpec("x", 1000, "EF21(OneBit())", 0)
        >>> assign([spec, spec._replace(length=300), spec._replace(length=400)], 2)
        [0, 1, 1]
    """
    costs = [_traffic(spec) for spec in buckets]
    loads, owners = [0] * servers, [0] * len(buckets)
    for bucket in sorted(range(len(buckets)), key=lambda b: (-costs[b], b)):
        owner = loads.index(min(loads))
        owners[bucket] = owner
        loads[owner] += costs[bucket]
    return owners


def _traffic(spec: BucketSpec) -> int:
    """Bytes up and down for one worker per round."""
    method = spec.make_method()
    down: Any = getattr(method, "server_compressor", None) or Identity()
    return method.compressor.nbytes(spec.length) + down.nbytes(spec.length)
