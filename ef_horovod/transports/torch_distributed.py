"""Transport over `torch.distributed`: for jobs started by torchrun, without Horovod."""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ef_horovod.arrays import Array
from ef_horovod.errors import CollectiveTimeoutError, UnsupportedError
from ef_horovod.transports.base import Measure, Transport, require_summable, split
from ef_horovod.transports.nodes import Levels, groups_of
from ef_horovod.transports.timeouts.waiting import RecurringWaits, limit_of

_LONGEST_SECONDS = 10 * 365 * 86400.0  # of a process group's own limit, in place of no limit


class TorchDistributed(Transport):
    """The ranks of a `torch.distributed` process group; collectives are asynchronous.

    `torch.distributed` matches collectives by their order, not by name. So each transport makes a
    process group of its own, in which nobody else's collectives can come between. All ranks of the
    group must make it, in the same order as other transports.

    Args:
        group: a process group of any backend (gloo, nccl, mpi); default all ranks.
        timeout: limit of every wait, in seconds; default $EF_HOROVOD_TIMEOUT or 300.

    Raises:
        UnsupportedError: `torch.distributed` is not initialised, or this rank is not in the group.

    Example:
        torch.distributed.init_process_group("gloo")
        optimizer = ef.DistributedOptimizer(optimizer, model.named_parameters(),
                                            compression=ef.EF21(ef.TopK(ratio=0.01)),
                                            transport=ef.TorchDistributed(group))
    """

    in_order = True
    levels_known = False

    def __init__(self, group: Any = None, timeout: float | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise UnsupportedError(
                "got a torch.distributed transport before torch.distributed was initialised, "
                'expected it after; call torch.distributed.init_process_group("gloo") first, in a '
                "job started by torchrun"
            )
        whole = dist.group.WORLD if group is None else group
        if whole == dist.GroupMember.NON_GROUP_MEMBER or dist.get_rank(whole) < 0:
            raise UnsupportedError(
                f"got a process group without rank {dist.get_rank()}, expected one that has it; "
                "wrap the optimizer on the ranks of the group only"
            )
        members = dist.get_process_group_ranks(whole)
        super().__init__(dist.get_rank(whole), len(members), limit_of(timeout))
        self.members = members
        if len(members) == dist.get_world_size():
            self.members = range(self.size)
        backend = dist.get_backend(whole)
        self._group: Any = dist.new_group(
            members,
            timeout=timedelta(seconds=min(2 * self.timeout, _LONGEST_SECONDS)),
            backend=backend,
            # Only the members call this, unless they are all ranks.
            use_local_synchronization=group is not None and backend != "mpi",
        )
        self._on_gpu = "nccl" in str(backend)
        self._waits = RecurringWaits()

    @property
    def _device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self._on_gpu else _CPU

    def allgather(
        self, name: str, data: np.ndarray, measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        if measure is not None:
            return self._gather_unequal(name, data, measure)
        return self._gather(name, data)

    def _gather(self, name: str, data: np.ndarray) -> Callable[[], list[np.ndarray]]:
        own = torch.from_numpy(data).to(self._device)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        work = dist.all_gather(parts, own, group=self._group, async_op=True)

        def finish() -> list[np.ndarray]:
            self._wait(work, name)
            self._count_allgather([data.size] * self.size)
            return [part.cpu().numpy() for part in parts]

        return finish

    def _gather_unequal(
        self, name: str, data: np.ndarray, measure: Measure
    ) -> Callable[[], list[np.ndarray]]:
        """Lengths first; the buffers follow when they are waited for."""
        lengths = self._gather(f"{name}.lengths", np.array([data.size], "<i8").view(np.uint8))

        def finish() -> list[np.ndarray]:
            sizes = [int(part.view("<i8")[0]) for part in lengths()]
            padded = np.zeros(max(sizes), np.uint8)
            padded[: data.size] = data
            parts = self._gather(name, padded)()
            joined = np.concatenate([part[:size] for part, size in zip(parts, sizes, strict=True)])
            return split(name, joined, data.size, self.size, measure)

        return finish

    def alltoall(
        self, name: str, parts: Sequence[np.ndarray], measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        sent = torch.from_numpy(np.concatenate(parts)).to(self._device)
        to_each = [part.size for part in parts]
        if measure is None:
            from_each = [parts[self.rank].size] * self.size
        else:  # every rank's sizes, because lengths differ
            row = np.array(to_each, "<i8").view(np.uint8)
            sizes = self._gather(f"{name}.lengths", row)()
            from_each = [int(row.view("<i8")[self.rank]) for row in sizes]
        arrived = torch.empty(sum(from_each), dtype=torch.uint8, device=sent.device)
        work = dist.all_to_all_single(
            arrived, sent, from_each, to_each, group=self._group, async_op=True
        )

        def finish() -> list[np.ndarray]:
            self._wait(work, name)
            whole = arrived.cpu().numpy()
            received = split(name, whole, parts[self.rank].size, self.size, measure)
            self._count_alltoall(parts, received)
            return received

        return finish

    def allreduce(self, name: str, values: Array) -> Callable[[], Array]:
        require_summable(values)
        given = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
        summed = given.to(self._device)  # itself, if it is there
        work = dist.all_reduce(summed, group=self._group, async_op=True)
        self._count_allreduce(given.numel() * given.element_size())

        def finish() -> Array:
            self._wait(work, name)
            if summed is not given:
                given.copy_(summed)
            return values

        return finish

    def _open_levels(self) -> Levels | None:
        own = os.environ.get("GROUP_RANK", socket.gethostname())  # torchrun's number of the node
        mine = np.array([zlib.crc32(own.encode())], "<u4").view(np.uint8)
        groups = groups_of([node.tobytes() for node in self._gather("places", mine)()])
        if groups is None:
            return None
        node, cross = (self._within(level) for level in groups)
        assert node is not None
        return Levels(node, cross, len(groups.cross), self.size / len(groups.nodes))

    def _within(self, level: Sequence[Sequence[int]]) -> TorchDistributed | None:
        """This rank's transport in one level; None if it is in none of its groups.

        All ranks make the groups of all ranks, which any backend can.
        """
        own = None
        for ranks in level:
            made = dist.new_group(
                [self.members[i] for i in ranks],
                backend=dist.get_backend(self._group),
                use_local_synchronization=len(self.members) < dist.get_world_size(),
            )
            if self.rank in ranks:
                own = TorchDistributed(made, self.timeout)
        return own

    def _wait(self, work: Any, name: str) -> None:
        try:
            self._waits.until(name, work.is_completed, self.timeout, lambda: self._waited(name))
            work.wait()
        except CollectiveTimeoutError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.who} failed in '{name}': {error}; another rank ended early, or had fewer "
                "batches: give all ranks the same number of steps (drop_last=True)"
            ) from error

    def _waited(self, name: str) -> str:
        return (
            f"{self.who} waited {self.timeout:g} s in '{name}' for at least one other rank; see "
            "why it did not get there (it failed, or has fewer batches), or raise timeout= or "
            "EF_HOROVOD_TIMEOUT"
        )


_CPU = torch.device("cpu")
