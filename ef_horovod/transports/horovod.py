"""The part of a Horovod transport that does not depend on the framework."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from horovod.common.process_sets import ProcessSet, global_process_set

from ef_horovod.errors import UnsupportedError
from ef_horovod.transports.base import Transport
from ef_horovod.transports.nodes import Levels, Place, groups_of, nodes_of
from ef_horovod.transports.timeouts.ending import meet_at_end
from ef_horovod.transports.timeouts.waiting import limit_of

_instances: dict[tuple[str, int], Iterator[int]] = {}  # by kind and process set
_LEVELS = "node", "cross"  # in names of collectives
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

    levels_known = False
    _hvd: ClassVar[Any]  # the framework's Horovod

    def __init__(
        self, prefix: str = "ef", process_set: Any = None, timeout: float | None = None
    ) -> None:
        self._process_set = process_set or global_process_set
        # A rank outside the set never takes part, but it may create the object.
        rank = self._process_set.rank() if self._process_set.included() else -1
        super().__init__(rank, self._process_set.size(), limit_of(timeout))
        self.prefix = prefix
        if self._process_set.process_set_id != 0:
            self.members = list(self._process_set.ranks)

    def named(self, name: str) -> str:
        """The collective's name in Horovod."""
        return f"{self.prefix}.{name}"

    @property
    def ranks_per_node(self) -> int:
        hvd = self._hvd
        # A given process set has its nodes' groups only if someone made them.
        if self._process_set.process_set_id != 0 or not _basics().is_homogeneous():
            return 1
        return hvd.local_size() if hvd.cross_size() > 1 else 1

    def _open_levels(self) -> Levels | None:
        if self.size == 1:
            return None
        hvd = self._hvd
        here = [hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), _adds_sets()]
        everyones = self.allgather("places", np.array(here, "<i4").view(np.uint8))()
        facts = [[int(x) for x in np.frombuffer(part.tobytes(), "<i4")] for part in everyones]
        places = [Place(*fact[:3]) for fact in facts]
        groups = groups_of(nodes_of(places))
        if groups is None:
            return None
        named = [[[self.members[i] for i in group] for group in level] for level in groups]
        fixed = [rank for rank, fact in zip(self.members, facts, strict=True) if not fact[3]]
        sets = self._sets([group for level in named for group in level], fixed)
        node, cross = (
            self._within(level, sets, kind) for level, kind in zip(named, _LEVELS, strict=True)
        )
        assert node is not None
        if self._process_set.process_set_id == 0:
            meet_at_end(lambda: self.barrier("end"))
        return Levels(node, cross, len(groups.cross), self.size / len(groups.nodes))

    def _within(
        self, level: list[list[int]], sets: dict[tuple[int, ...], Any], kind: str
    ) -> Transport | None:
        """This rank's transport in one level; None if it is in none of its groups."""
        own = next((group for group in level if self.members[self.rank] in group), None)
        if own is None:
            return None
        return type(self)(f"{self.prefix}.{kind}", sets[tuple(own)], self.timeout)

    def _sets(self, groups: list[list[int]], fixed: list[int]) -> dict[tuple[int, ...], Any]:
        """Process sets of these ranks: those that exist, and new ones; collective over all ranks.

        Args:
            groups: ranks of each set.
            fixed: ranks whose Horovod adds no sets; the others would wait for them.

        Raises:
            UnsupportedError: they do not exist, and Horovod adds none.
        """
        known = {tuple(ps.ranks): ps for ps in _known_sets()}
        missing = [group for group in groups if tuple(group) not in known]
        whole = self._process_set.process_set_id == 0
        if missing and not whole:  # ranks outside would have to add them, too
            raise UnsupportedError(
                f"got exchange='hierarchical' with a process_set, and no process sets of its ranks "
                f"{missing}, expected one of each group, because all ranks have to add them; call "
                "hvd.add_process_set for each before, or leave process_set out"
            )
        if missing and fixed:
            raise UnsupportedError(
                f"got exchange='hierarchical' in a job whose process sets are fixed on ranks "
                f"{str(fixed)[:80]}, expected some of ranks {missing}; write "
                "hvd.init(process_sets='dynamic'), or set HOROVOD_DYNAMIC_PROCESS_SETS=1 on all "
                "ranks"
            )
        for group in missing:
            known[tuple(group)] = self._hvd.add_process_set(group)
        return known

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


def _adds_sets() -> bool:
    """Whether this rank's Horovod adds process sets after its start, by the variable it reads."""
    try:
        return int(os.environ.get("HOROVOD_DYNAMIC_PROCESS_SETS", "0")) > 0
    except ValueError:
        return False


def _basics() -> Any:
    """Horovod's calls that not every framework's module has."""
    from horovod.common import process_sets

    return process_sets._basics


def _known_sets() -> list[ProcessSet]:
    """Horovod's process sets, also those that nobody holds."""
    found = []
    for number, ranks in _basics()._get_process_set_ids_and_ranks().items():
        one = ProcessSet(list(ranks))
        one.process_set_id = number
        found.append(one)
    return found
