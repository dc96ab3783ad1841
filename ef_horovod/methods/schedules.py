"""Schedules: numbers that depend on the step, equal on all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ef_horovod.common.options import is_in, keep_number


@dataclass(frozen=True)
class Decay:
    """initial * (offset / (offset + t)) ** power at step t = 0, 1, ...

    Args:
        power: 2/3 for STORM, 1 for ROOT-SGD's 1 / (t + 1), 0 for a constant.
        initial: value at t = 0.
        offset: number of steps until the value is 2 ** -power * initial.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> [Decay(power=1).at(t) for t in range(3)]
        [1.0, 0.5, 0.3333333333333333]
    """

    power: float
    initial: float = 1.0
    offset: float = 1.0

    def __post_init__(self) -> None:
        way_out = "Decay(power=1) is 1, 1/2, 1/3, ..."
        keep_number(self, "power", "[0, inf)", way_out)
        keep_number(self, "initial", "(0, inf)", way_out)
        keep_number(self, "offset", "(0, inf)", way_out)

    def at(self, step: int) -> float:
        """The value at a step."""
        return float(self.initial * (self.offset / (self.offset + step)) ** self.power)


Schedule = float | Decay


def value_at(schedule: Schedule, step: int) -> float:
    """The value of a number or a schedule at a step."""
    return schedule.at(step) if isinstance(schedule, Decay) else float(schedule)


def keep_schedule(
    owner: Any, name: str, interval: str, way_out: str, what: str = "a number"
) -> None:
    """Check a field of a frozen dataclass: a number in an interval, or a Decay that starts there.

    A Decay never rises, so its start is its largest value.

    Raises:
        ValueError: it is something else.
    """
    value = getattr(owner, name)
    if not (isinstance(value, Decay) and is_in(value.initial, interval)):
        keep_number(owner, name, interval, way_out, what, also=" or a Decay that starts there")


def keep_weight(owner: Any, name: str) -> None:
    """Check a field of a frozen dataclass: a weight in (0, 1], or a schedule of them.

    Raises:
        ValueError: it is something else.
    """
    keep_schedule(owner, name, "(0, 1]", "0.1 averages over about ten steps", "a weight")
