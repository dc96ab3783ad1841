"""Transport between ranks of one process, for simulations and tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.errors import CollectiveTimeoutError, ConfigMismatchError
from ef_horovod.transports.base import Measure, Transport, require_summable
from ef_horovod.transports.timeouts.waiting import DEFAULT_TIMEOUT_SECONDS


class LocalTransport(Transport):
    """One endpoint of a `local_group`; usable from one thread or from many.

    Example:
        >>> import numpy
        >>> a, b = local_group(2)
        >>> wait = a.allreduce("sum", numpy.array([1.0], dtype="float32"))
        >>> _ = b.allreduce("sum", numpy.array([2.0], dtype="float32"))
        >>> wait()
        array([3.], dtype=float32)
    """

    def __init__(self, rank: int, mailbox: _Mailbox, timeout: float) -> None:
        super().__init__(rank, mailbox.size, timeout)
        self._mailbox = mailbox

    def allgather(
        self, name: str, data: np.ndarray, measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        collect = self._deposit(f"allgather.{name}", np.array(data, np.uint8))
        self.bytes_sent += data.size * (self.size - 1)

        def finish() -> list[np.ndarray]:
            parts = collect()
            self.bytes_received += sum(part.size for part in parts) - data.size
            return parts

        return finish

    def alltoall(
        self, name: str, parts: Sequence[np.ndarray], measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        sent = [np.array(part, np.uint8) for part in parts]
        collect = self._deposit(f"alltoall.{name}", sent)

        def finish() -> list[np.ndarray]:
            received = [of_rank[self.rank] for of_rank in collect()]
            self._count_alltoall(sent, received)
            return received

        return finish

    def allreduce(self, name: str, values: Array) -> Callable[[], Array]:
        require_summable(values)
        xp, device = namespace(values), getattr(values, "device", None)
        data = np.array(xp.to_host(values))
        collect = self._deposit(f"allreduce.{name}", data)
        self._count_allreduce(data.nbytes)

        def finish() -> Array:
            first, *others = parts = collect()
            if len(sizes := {part.size for part in parts}) > 1:
                raise ConfigMismatchError(
                    f"ranks have {sorted(sizes)} numbers in the sum '{name}', expected the same; "
                    "sum arrays that have one length on all ranks"
                )
            total = first.copy()
            with np.errstate(over="ignore"):  # an infinity is the right sum and is found later
                for part in others:  # in rank order, so that all ranks get the same bits
                    total += part
            return xp.from_host(total, device)

        return finish

    def _deposit(self, name: str, data: Any) -> Callable[[], list[Any]]:
        entry = self._mailbox.deposit(name, self.rank, data)

        def collect() -> list[Any]:
            if not entry.complete.wait(min(self.timeout, threading.TIMEOUT_MAX)):
                missing = sorted(set(range(self.size)) - set(entry.parts))
                raise CollectiveTimeoutError(
                    f"rank {self.rank} waited {self.timeout:g} s in '{name}' for ranks {missing}; "
                    "see why they did not get there, or raise timeout="
                )
            return [entry.parts[rank] for rank in range(self.size)]

        return collect


def local_group(size: int, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> list[LocalTransport]:
    """`size` connected endpoints inside this process."""
    if size < 1:
        raise ValueError(f"got {size} workers, expected at least 1")
    mailbox = _Mailbox(size)
    return [LocalTransport(rank, mailbox, timeout) for rank in range(size)]


class _Entry:
    def __init__(self) -> None:
        self.parts: dict[int, Any] = {}
        self.complete = threading.Event()


class _Mailbox:
    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Lock()
        self._open: dict[str, _Entry] = {}

    def deposit(self, name: str, rank: int, data: Any) -> _Entry:
        with self._lock:
            entry = self._open.setdefault(name, _Entry())
            if rank in entry.parts:
                raise ValueError(
                    f"rank {rank} started '{name}' twice, expected once until all ranks have; "
                    "give every collective in flight a different name"
                )
            entry.parts[rank] = data
            if len(entry.parts) == self.size:
                del self._open[name]
                entry.complete.set()
            return entry
