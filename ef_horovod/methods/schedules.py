"""Checks of a method's numbers that may be schedules; `ef_horovod.common.schedules` has these."""

from __future__ import annotations

from typing import Any

from ef_horovod.common.options import is_in, keep_number
from ef_horovod.common.schedules import Decay as Decay
from ef_horovod.common.schedules import Schedule
from ef_horovod.common.schedules import Scheduled as Scheduled
from ef_horovod.common.schedules import value_at as value_at


def keep_schedule(
    owner: Any, name: str, interval: str, way_out: str, what: str = "a number"
) -> None:
    """Check a field of a frozen dataclass: a number in an interval, or a schedule of them.

    Raises:
        ValueError: it is something else.
    """
    value = getattr(owner, name)
    if not (isinstance(value, Schedule) and all(is_in(one, interval) for one in value.bounds)):
        keep_number(owner, name, interval, way_out, what, also=", or a schedule of them")


def keep_weight(owner: Any, name: str) -> None:
    """Check a field of a frozen dataclass: a weight in (0, 1], or a schedule of them.

    Raises:
        ValueError: it is something else.
    """
    keep_schedule(owner, name, "(0, 1]", "0.1 averages over about ten steps", "a weight")
