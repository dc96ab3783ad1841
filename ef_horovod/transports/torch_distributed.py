"""Transport over torch.distributed: collectives that run in the background, without Horovod.

torch.distributed matches collectives by their order and wants equal sizes. So each buffer travels
in a frame with a check of the collective's name and with its length. Frames are as long as the
longest buffer so far of that name; where one is longer, it is sent again in longer frames. All
ranks see all lengths, so all do the same. Start and wait for collectives in the same order on all
ranks.
"""

from __future__ import annotations

import os
import platform
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import distributed

from ef_horovod.arrays import Array
from ef_horovod.errors import CollectiveTimeoutError, ConfigMismatchError, UnsupportedError
from ef_horovod.transports.base import Measure, Transport, require_summable
from ef_horovod.transports.nodes import Levels, groups_of
from ef_horovod.transports.timeouts.waiting import RecurringWaits, limit_of

_HEAD = 3  # numbers before a buffer: check of the name, length, longest buffer of that rank
_HEAD_NBYTES = 8 * _HEAD
_LATE_SECONDS = 1.0  # for ranks that wait, too, to say so
Finish = Callable[[], list[np.ndarray]]


class TorchDistributed(Transport):
    """The ranks of a process group of gloo, nccl or mpi.

    Creating it is collective over the group: it makes a group of its own, so that other users'
    collectives cannot interfere.

    Args:
        group: a process group, or the ranks of one; default all ranks.
        timeout: limit of every wait, in seconds; default $EF_HOROVOD_TIMEOUT or 300.

    Raises:
        UnsupportedError: there is no process group, or this rank is not in it.

    Example:
        torch.distributed.init_process_group("gloo")
        transport = TorchDistributed()
    """

    in_order = True
    levels_known = False

    def __init__(
        self,
        group: distributed.ProcessGroup | Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> None:
        ranks = _ranks_of(group)
        super().__init__(ranks.index(distributed.get_rank()), len(ranks), limit_of(timeout))
        self.members = range(len(ranks)) if ranks == list(range(len(ranks))) else ranks
        self._group = distributed.new_group(ranks, use_local_synchronization=True)
        on_gpu = distributed.get_backend(self._group) == "nccl"
        self._device = torch.device("cuda" if on_gpu else "cpu")
        self._rooms: dict[str, int] = {}  # bytes of a buffer in a frame, by name
        self._waits = RecurringWaits()

    def allgather(self, name: str, data: np.ndarray, measure: Measure | None = None) -> Finish:
        finish = self._framed(name, [data], _gather)

        def gathered() -> list[np.ndarray]:
            parts = finish()
            return _require_sizes(name, parts, data.size, measure)

        return gathered

    def alltoall(
        self, name: str, parts: Sequence[np.ndarray], measure: Measure | None = None
    ) -> Finish:
        finish = self._framed(name, parts, _scatter)

        def received() -> list[np.ndarray]:
            return _require_sizes(name, finish(), parts[self.rank].size, measure)

        return received

    def allreduce(self, name: str, values: Array) -> Callable[[], Array]:
        require_summable(values)
        tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
        if name not in self._rooms:
            self._agree(name, tensor.numel())
        there = tensor.to(self._device)  # the tensor itself if it is there
        with self._naming(name):
            work = distributed.all_reduce(there, group=self._group, async_op=True)
        self._count_allreduce(tensor.numel() * tensor.element_size())

        def finish() -> Array:
            self._wait(work, name)
            if there is not tensor:
                tensor.copy_(there)
            return values

        return finish

    def _agree(self, name: str, length: int) -> None:
        """Raise unless all ranks sum vectors of one length; waits, at a name's first use."""
        own = np.array([length], "<i8").view(np.uint8)
        lengths = [int(part.view("<i8")[0]) for part in self.allgather(f"{name}.length", own)()]
        if set(lengths) != {length}:
            raise ConfigMismatchError(
                f"{self.who} has {length} numbers of the sum '{name}' where all ranks have "
                f"{lengths}, expected the same; use the same model and config on all ranks"
            )
        self._rooms[name] = 0

    def _framed(self, name: str, parts: Sequence[np.ndarray], collective: Any) -> Finish:
        """Send each rank its buffer, or all of them the same; the returned function waits."""
        begun = self._send(name, parts, collective)

        def finish() -> list[np.ndarray]:
            received = self._receive(name, *begun)
            longest = max(int(head[2]) for head, _ in received)
            if longest > self._rooms.get(name, 0):  # on all ranks
                self._rooms[name] = longest
                received = self._receive(name, *self._send(name, parts, collective))
            return [body[: int(head[1])] for head, body in received]

        return finish

    def _send(
        self, name: str, parts: Sequence[np.ndarray], collective: Any
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Start a collective with a frame for each rank, or one for all."""
        room, longest = self._rooms.get(name, 0), max(part.size for part in parts)
        frames = np.zeros((len(parts), _HEAD_NBYTES + room), np.uint8)
        for frame, part in zip(frames, parts, strict=True):
            frame[:_HEAD_NBYTES] = np.array([_code(name), part.size, longest], "<i8").view(np.uint8)
            if part.size <= room:
                frame[_HEAD_NBYTES : _HEAD_NBYTES + part.size] = part
        sent = torch.from_numpy(frames).to(self._device)
        arrived = sent.new_empty((self.size, frames.shape[1]))
        with self._naming(name):
            work = collective(arrived, sent, self._group)
        moved = frames.shape[1] * (self.size - 1)
        self.bytes_sent += moved
        self.bytes_received += moved
        return work, arrived, sent  # sent: kept until the end of the collective

    def _receive(
        self, name: str, work: Any, arrived: torch.Tensor, sent: torch.Tensor
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each rank's header and buffer."""
        self._wait(work, name)
        found = [
            (frame[:_HEAD_NBYTES].view("<i8"), frame[_HEAD_NBYTES:])
            for frame in arrived.cpu().numpy()
        ]
        others = [rank for rank, (head, _) in enumerate(found) if head[0] != _code(name)]
        if others:
            raise ConfigMismatchError(
                f"{self.who} is in '{name}' where ranks {[self.members[r] for r in others]} are in "
                "another collective, expected the same order on all ranks; use the same model and "
                "config on all of them"
            )
        return found

    def _wait(self, work: Any, name: str) -> None:
        self._waits.until(
            name, lambda: bool(work.is_completed()), self.timeout, lambda: self._waited(name)
        )
        with self._naming(name):
            work.wait()

    def _naming(self, name: str) -> _Naming:
        return _Naming(self.who, name)

    def _waited(self, name: str) -> str:
        missing = self._not_waiting(name)
        return (
            f"{self.who} waited {self.timeout:g} s in '{name}' for "
            f"{f'ranks {missing}' if missing else 'at least one other rank'}; see why they did not "
            "get there (a failure, or fewer batches), or raise timeout= or EF_HOROVOD_TIMEOUT"
        )

    def _not_waiting(self, name: str) -> list[int]:
        """Ranks that do not say, in the store of the job, that they wait for this collective."""
        store = distributed.distributed_c10d._get_default_store()
        keys = [f"ef_horovod/waits/{self._group.group_name}/{name}/{i}" for i in range(self.size)]
        try:
            store.set(keys[self.rank], "1")
            time.sleep(min(_LATE_SECONDS, self.timeout))
            return [self.members[i] for i, key in enumerate(keys) if not store.check([key])]
        except RuntimeError:  # the store's process has ended
            return []

    def _open_levels(self) -> Levels | None:
        here = os.environ.get("GROUP_RANK") or platform.node()
        name = np.frombuffer(here.encode(), np.uint8).copy()
        nodes = [part.tobytes() for part in self._framed("places", [name], _gather)()]
        groups = groups_of(nodes)
        if groups is None:
            return None
        node, cross = (self._within(level) for level in groups)
        assert node is not None
        return Levels(node, cross, len(groups.cross), self.size / len(groups.nodes))

    def _within(self, level: list[list[int]]) -> TorchDistributed | None:
        """This rank's transport in one level; None if it is in none of its groups."""
        own = next((group for group in level if self.rank in group), None)
        if own is None:
            return None
        return TorchDistributed([self.members[rank] for rank in own], self.timeout)


class _Naming:
    """Adds rank and collective to the errors of torch.distributed."""

    def __init__(self, who: str, name: str) -> None:
        self._who, self._name = who, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, ConfigMismatchError):
            raise CollectiveTimeoutError(
                f"{self._who} failed in '{self._name}': {error}; a rank ended early, or has fewer "
                "batches: see what the other ranks said before"
            ) from error


def _ranks_of(group: distributed.ProcessGroup | Sequence[int] | None) -> list[int]:
    if not distributed.is_available() or not distributed.is_initialized():
        raise UnsupportedError(
            "got no process group of torch.distributed, expected one; call "
            "torch.distributed.init_process_group('gloo') first, in a job of torchrun"
        )
    if group is None:
        return list(range(distributed.get_world_size()))
    if group == distributed.GroupMember.NON_GROUP_MEMBER:
        raise UnsupportedError(
            f"got a process group without rank {distributed.get_rank()}, expected one that has "
            "it; wrap only where the rank is in the group"
        )
    if isinstance(group, Sequence):
        return list(group)
    return list(distributed.get_process_group_ranks(group))


def _gather(arrived: torch.Tensor, sent: torch.Tensor, group: Any) -> Any:
    return distributed.all_gather(list(arrived), sent[0], group=group, async_op=True)


def _scatter(arrived: torch.Tensor, sent: torch.Tensor, group: Any) -> Any:
    return distributed.all_to_all_single(arrived, sent, group=group, async_op=True)


def _require_sizes(
    name: str, parts: list[np.ndarray], own: int, measure: Measure | None
) -> list[np.ndarray]:
    """The parts, if they have the lengths that they should have."""
    for rank, part in enumerate(parts):
        expected = own if measure is None else measure(part)
        if part.size != expected:
            raise ConfigMismatchError(
                f"'{name}' brought {part.size} bytes from rank {rank}, expected {expected}; use "
                "the same config on all ranks"
            )
    return parts


def _code(name: str) -> int:
    return zlib.crc32(name.encode())
