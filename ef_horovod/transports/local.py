"""Transport between ranks of one process, for simulations and tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.errors import CollectiveTimeoutError, ConfigMismatchError, UnsupportedError
from ef_horovod.transports.base import Measure, Transport, require_summable
from ef_horovod.transports.nodes import Levels, groups_of
from ef_horovod.transports.timeouts.waiting import DEFAULT_TIMEOUT_SECONDS


class LocalTransport(Transport):
    """One endpoint of a `local_group`; usable from one thread or from many.

    Args:
        rank: of this endpoint.
        size: number of ranks.
        mailbox: of the ranks in this process.
        timeout: limit of every wait, in seconds.

    Example:
        >>> import numpy
        >>> a, b = local_group(2)
        >>> wait = a.allreduce("sum", numpy.array([1.0], dtype="float32"))
        >>> _ = b.allreduce("sum", numpy.array([2.0], dtype="float32"))
        >>> wait()
        array([3.], dtype=float32)
    """

    def __init__(
        self,
        rank: int,
        size: int,
        mailbox: Mailbox,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
    ) -> None:
        super().__init__(rank, size, timeout)
        self._mailbox = mailbox

    def allgather(
        self, name: str, data: np.ndarray, measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        def gathered(parts: list[np.ndarray]) -> list[np.ndarray]:
            return self._gathered(name, parts, measure)

        collect = self._deposit(f"allgather.{name}", np.array(data, np.uint8), gathered)
        self.bytes_sent += data.size * (self.size - 1)

        def finish() -> list[np.ndarray]:
            parts = list(collect())
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
        collect = self._deposit(f"allreduce.{name}", data, lambda parts: self._sum(name, parts))
        self._count_allreduce(data.nbytes)
        return lambda: xp.from_host(collect().copy(), device)

    def _gathered(
        self, name: str, parts: list[np.ndarray], measure: Measure | None
    ) -> list[np.ndarray]:
        """The buffers of all ranks, from those in this process: here the same."""
        return parts

    def _sum(self, name: str, parts: list[np.ndarray]) -> np.ndarray:
        """The sum over all ranks, from the arrays in this process."""
        if len(sizes := {part.size for part in parts}) > 1:
            raise ConfigMismatchError(
                f"ranks have {sorted(sizes)} numbers in the sum '{name}', expected the same; sum "
                "arrays that have one length on all ranks"
            )
        total = parts[0].copy()
        with np.errstate(over="ignore"):  # an infinity is the right sum and is found later
            for part in parts[1:]:  # in rank order, so that all ranks get the same bits
                total += part
        return total

    def _deposit(
        self, name: str, data: Any, join: Callable[[list[Any]], Any] = list
    ) -> Callable[[], Any]:
        """Put this rank's data down; the returned function waits for what `join` makes of all."""
        entry = self._mailbox.deposit(name, self.rank, data)
        me = f"rank {self.members[self.rank]}"

        def collect() -> Any:
            if self._mailbox.one_thread and not entry.complete.is_set():
                raise UnsupportedError(
                    f"{me} waits in '{name}' for ranks {self._missing(entry)} of the same "
                    "thread, expected no wait before all ranks have started; let the "
                    "exchange's `start` return a function that waits"
                )
            if not entry.complete.wait(min(self.timeout, threading.TIMEOUT_MAX)):
                raise CollectiveTimeoutError(
                    f"{me} waited {self.timeout:g} s in '{name}' for ranks "
                    f"{self._missing(entry)}; see why they did not get there, or raise timeout="
                )
            return entry.joined(join)

        return collect

    def _missing(self, entry: _Entry) -> list[int]:
        return [self.members[rank] for rank in sorted(set(self._mailbox.ranks) - set(entry.parts))]


def local_group(
    size: int,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    *,
    one_thread: bool = False,
    nodes: Sequence[object] = (),
) -> list[LocalTransport]:
    """`size` connected endpoints inside this process.

    Args:
        size: number of ranks.
        timeout: limit of every wait, in seconds.
        one_thread: whether one thread runs all ranks, so that waiting for another one is an error.
        nodes: of each rank, to pretend several nodes: equal things for ranks of one node.

    Example:
        >>> [end.levels().cross.members for end in local_group(4, nodes=[0, 0, 1, 1])]
        [[0, 2], [1, 3], [0, 2], [1, 3]]
    """
    if size < 1:
        raise ValueError(f"got {size} workers, expected at least 1")
    mailbox = Mailbox(range(size), one_thread=one_thread)
    ends = [LocalTransport(rank, size, mailbox, timeout) for rank in range(size)]
    groups = groups_of(nodes) if nodes else None
    if groups is None:
        return ends
    node_of, cross_of = (
        {
            end.members[end.rank]: end
            for group in level
            for end in _subgroup(group, timeout, one_thread)
        }
        for level in groups
    )
    for end in ends:
        per_node = size / len(groups.nodes)
        slices = len(groups.cross)
        end._levels = Levels(node_of[end.rank], cross_of.get(end.rank), slices, per_node)
    return ends


def _subgroup(ranks: list[int], timeout: float, one_thread: bool) -> list[LocalTransport]:
    ends = local_group(len(ranks), timeout, one_thread=one_thread)
    for end in ends:
        end.members = ranks
    return ends


class _Entry:
    """What the ranks of one process have put down for one collective."""

    def __init__(self) -> None:
        self.parts: dict[int, Any] = {}
        self.complete = threading.Event()
        self._lock = threading.Lock()
        self._joined: tuple[Any, ...] = ()

    def joined(self, join: Callable[[list[Any]], Any]) -> Any:
        """What `join` makes of the parts in rank order, computed once."""
        with self._lock:
            if not self._joined:
                self._joined = (join([self.parts[rank] for rank in sorted(self.parts)]),)
            return self._joined[0]


class Mailbox:
    """The collectives under way among the ranks of one process.

    Args:
        ranks: of this process.
        one_thread: whether one thread runs them all.
    """

    def __init__(self, ranks: range, *, one_thread: bool = False) -> None:
        self.ranks, self.one_thread = ranks, one_thread
        self._lock = threading.Lock()
        self._open: dict[str, _Entry] = {}

    def deposit(self, name: str, rank: int, data: Any) -> _Entry:
        """Add a rank's data to the collective under way by this name."""
        with self._lock:
            entry = self._open.get(name)
            if entry is None:
                entry = self._open[name] = _Entry()
            if rank in entry.parts:
                raise ValueError(
                    f"rank {rank} started '{name}' twice, expected once until all ranks have; "
                    "give every collective in flight a different name"
                )
            entry.parts[rank] = data
            if len(entry.parts) == len(self.ranks):
                del self._open[name]
                entry.complete.set()
            return entry
