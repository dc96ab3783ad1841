"""The part of a Horovod transport that does not depend on the framework."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from horovod.common.process_sets import global_process_set

from ef_horovod.errors import UnsupportedError
from ef_horovod.transports.base import Transport
from ef_horovod.transports.timeouts.waiting import limit_of

_instances: dict[tuple[str, int], Iterator[int]] = {}  # by kind and process set
_MOST_NBYTES = 2**31 - 1  # per gather: Horovod's counts and offsets are C ints


def next_prefix(kind: str, process_set: Any = None) -> str:
    """A new prefix for collective names, one for each user of a process set.

    The counter is per set, because ranks outside a set may not know its users.

    Args:
        kind: "ef", or "ef.stock" for adapters of Horovod's own optimizers and tapes.
        process_set: a `hvd.ProcessSet`; default all ranks.
    """
    place = (process_set or global_process_set).process_set_id
    number = next(_instances.setdefault((kind, place), itertools.count()))
    return f"{kind}{number}" if place == 0 else f"{kind}.set{place}.{number}"


class HorovodTransport(Transport):
    """The ranks of a Horovod process set; `hvd.init()` must have been called.

    Args:
        prefix: put before every name, so that two users of one job do not collide.
        process_set: a `hvd.ProcessSet`; default all ranks.
        timeout: limit of every wait, in seconds; default $EF_HOROVOD_TIMEOUT or 300.
    """

    def __init__(
        self, prefix: str = "ef", process_set: Any = None, timeout: float | None = None
    ) -> None:
        self._process_set = process_set or global_process_set
        # A rank outside the set never takes part, but it may create the object.
        rank = self._process_set.rank() if self._process_set.included() else -1
        super().__init__(rank, self._process_set.size(), limit_of(timeout))
        self._prefix = prefix

    def named(self, name: str) -> str:
        """The collective's name in Horovod."""
        return f"{self._prefix}.{name}"

    def require_countable(self, name: str, nbytes: int) -> None:
        """Raise if `nbytes` from each rank are more than Horovod's gather can place.

        Raises:
            UnsupportedError: on all ranks, if `nbytes` is equal on all of them.
        """
        if nbytes * self.size > _MOST_NBYTES:
            raise UnsupportedError(
                f"got {nbytes} bytes to gather from each of {self.size} ranks for "
                f"'{self.named(name)}', expected at most {_MOST_NBYTES} together, which is as far "
                "as Horovod counts; take exchange='double_pass', a smaller bucket_bytes, or a "
                "compressor that sends less"
            )
