"""Ranks of a Horovod job, by horovod.torch: named, asynchronous, in the background."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError

from ef_horovod.arrays import Array
from ef_horovod.transports.base import Measure, Transport, require_summable, split
from ef_horovod.transports.waiting import default_timeout, wait_until


class HorovodTorchTransport(Transport):
    """The ranks of a Horovod process set; `hvd.init()` must have been called.

    Args:
        prefix: put before every name, so that two users of one job do not meet.
        process_set: a `hvd.ProcessSet`; default all ranks.
        timeout: limit of every wait, in seconds; default $EF_HOROVOD_TIMEOUT or 300.
    """

    def __init__(
        self, prefix: str = "ef", process_set: Any = None, timeout: float | None = None
    ) -> None:
        self._process_set = process_set or hvd.global_process_set
        # Horovod never asks a rank outside the set to take part, but it may make the object.
        rank = self._process_set.rank() if self._process_set.included() else -1
        super().__init__(rank, self._process_set.size(), timeout or default_timeout())
        self._prefix = prefix

    def allgather(
        self, name: str, data: np.ndarray, measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        handle = hvd.allgather_async(
            torch.from_numpy(data), name=self._named(name), process_set=self._process_set
        )

        def finish() -> list[np.ndarray]:
            gathered = self._wait(handle, name).numpy()
            parts = split(name, gathered, data.size, self.size, measure)
            self._count_allgather([part.size for part in parts])
            return parts

        return finish

    def allreduce(self, name: str, values: Array) -> Callable[[], Array]:
        require_summable(values)
        tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
        handle = hvd.allreduce_async_(
            tensor, op=hvd.Sum, name=self._named(name), process_set=self._process_set
        )
        self._count_allreduce(tensor.numel() * tensor.element_size())

        def finish() -> Array:
            self._wait(handle, name)
            return values

        return finish

    def _named(self, name: str) -> str:
        return f"{self._prefix}.{name}"

    def _wait(self, handle: int, name: str) -> torch.Tensor:
        wait_until(lambda: bool(hvd.poll(handle)), self.timeout, lambda: self._waited(name))
        try:
            return hvd.synchronize(handle)
        except HorovodInternalError as error:
            raise HorovodInternalError(
                f"rank {self.rank} failed in '{self._named(name)}': {error}; "
                "a rank ended early, or called hvd.join(), which cannot go with compression: "
                "give all ranks the same number of steps (drop_last=True)"
            ) from error

    def _waited(self, name: str) -> str:
        return (
            f"rank {self.rank} of {self.size} waited {self.timeout:g} s in '{self._named(name)}' "
            "for at least one other rank (Horovod's stall warning on rank 0 names it); see why it "
            "did not get there (it failed, has fewer batches, or called hvd.join(), which cannot "
            "go with compression), or raise timeout= or EF_HOROVOD_TIMEOUT"
        )
