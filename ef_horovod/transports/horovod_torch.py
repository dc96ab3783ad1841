"""Transport over horovod.torch: named collectives that run in the background."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError

from ef_horovod.arrays import Array
from ef_horovod.errors import CollectiveTimeoutError
from ef_horovod.transports.base import Measure, Spans, require_summable, split
from ef_horovod.transports.horovod import HorovodTransport
from ef_horovod.transports.timeouts.ending import hurry, refuse_join
from ef_horovod.transports.timeouts.waiting import RecurringWaits
from ef_horovod.transports.timeouts.watchdog import ended_after

refuse_join("horovod.torch", "horovod.torch.mpi_ops")


class HorovodTorchTransport(HorovodTransport):
    """The ranks of a Horovod process set; collectives are asynchronous."""

    _hvd = hvd

    def __init__(
        self, prefix: str = "ef", process_set: Any = None, timeout: float | None = None
    ) -> None:
        super().__init__(prefix, process_set, timeout)
        self._waits = RecurringWaits()

    def allgather(
        self, name: str, data: np.ndarray, measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        self.require_countable(name, data.size)
        with self._naming(name):
            handle = hvd.allgather_async(
                torch.from_numpy(data), name=self.named(name), process_set=self._process_set
            )

        def finish() -> list[np.ndarray]:
            gathered = self._wait(handle, name).numpy()
            parts = split(name, gathered, data.size, self.size, measure)
            self._count_allgather([part.size for part in parts])
            return parts

        return finish

    def alltoall(
        self, name: str, parts: Sequence[np.ndarray], measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        with self._naming(name):
            handle = hvd.alltoall_async(
                torch.from_numpy(np.concatenate(parts)),
                splits=torch.tensor([part.size for part in parts], dtype=torch.int32),
                name=self.named(name),
                process_set=self._process_set,
            )

        def finish() -> list[np.ndarray]:
            arrived, _ = self._wait(handle, name)
            received = split(name, arrived.numpy(), parts[self.rank].size, self.size, measure)
            self._count_alltoall(parts, received)
            return received

        return finish

    def reduce_scatter(self, name: str, values: Array, slices: Spans) -> Callable[[], Array]:
        if not isinstance(values, torch.Tensor):
            return super().reduce_scatter(name, values, slices)
        lengths = torch.tensor([stop - start for start, stop in slices], dtype=torch.int32)
        own = int(lengths[self.rank])
        with self._naming(name):
            handle = hvd.alltoall_async(
                values, splits=lengths, name=self.named(name), process_set=self._process_set
            )

        def summed() -> Array:
            parts = self._wait(handle, name)[0].view(self.size, own)
            total = parts[0]
            for part in parts[1:]:  # in rank order, as in the base class
                total.add_(part)
            return total

        return summed

    def gather_slices(self, name: str, part: Array, slices: Spans) -> Callable[[], Array]:
        if not isinstance(part, torch.Tensor):
            return super().gather_slices(name, part, slices)
        with self._naming(name):
            handle = hvd.allgather_async(part, name=self.named(name), process_set=self._process_set)
        return lambda: self._wait(handle, name)

    def allreduce(self, name: str, values: Array) -> Callable[[], Array]:
        require_summable(values)
        tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
        with self._naming(name):
            handle = hvd.allreduce_async_(
                tensor, op=hvd.Sum, name=self.named(name), process_set=self._process_set
            )
        self._count_allreduce(tensor.numel() * tensor.element_size())

        def finish() -> Array:
            self._wait(handle, name)
            return values

        return finish

    def _wait(self, handle: int, name: str) -> Any:
        try:
            self._waits.until(
                name, lambda: bool(hvd.poll(handle)), self.timeout, lambda: self._waited(name)
            )
        except CollectiveTimeoutError:
            hurry()
            raise
        with self._naming(name):
            return hvd.synchronize(handle)

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Add rank and collective to Horovod's errors; end the process if Horovod hangs."""
        try:
            with ended_after(self.timeout, self._stuck(name)):
                yield
        except HorovodInternalError as error:
            hurry()
            raise HorovodInternalError(
                f"{self.who} failed in '{self.named(name)}': {error}; "
                "a rank ended early, or called hvd.join(), which cannot go with compression: "
                "give all ranks the same number of steps (drop_last=True)"
            ) from error

    def _stuck(self, name: str) -> str:
        return (
            f"{self.who} called Horovod for '{self.named(name)}', which did "
            f"not return in {self.timeout:g} s and keeps Python's lock, so this rank ends; Horovod "
            "does that where it shuts down beneath a running program: see what the other ranks "
            "said before, or raise timeout= or EF_HOROVOD_TIMEOUT"
        )

    def _waited(self, name: str) -> str:
        return (
            f"{self.who} waited {self.timeout:g} s in '{self.named(name)}' "
            f"for at least one other rank (Horovod's stall warning on rank {self.members[0]} "
            "names it); see why it did not get there (it failed, has fewer batches, or called "
            "hvd.join(), which cannot go with compression), or raise timeout= or EF_HOROVOD_TIMEOUT"
        )
