"""Schedules: numbers that depend on the step, equal on all ranks.

A new one is a frozen dataclass:

    @dataclass(frozen=True)
    class Halving(Schedule):
        every: int
        def at(self, step): return 2.0 ** -(step // self.every)
        bounds = (5e-324, 1.0)
        final = 0.0
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ef_horovod.common.options import is_in, keep, keep_number, keep_whole, number, whole

_LEAST = math.ulp(0.0)  # the smallest positive number


class Schedule:
    """Base of schedules: frozen dataclasses that are functions of the step."""

    def at(self, step: int) -> float:
        """The value at step 0, 1, ..."""
        raise NotImplementedError

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest value of all steps."""
        raise NotImplementedError

    @property
    def final(self) -> float:
        """The value after all changes, or the limit that the values approach."""
        raise NotImplementedError


Scheduled = float | Schedule


@dataclass(frozen=True)
class Decay(Schedule):
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

    @property
    def bounds(self) -> tuple[float, float]:
        return (_LEAST if self.power else self.initial), self.initial

    @property
    def final(self) -> float:
        return 0.0 if self.power else float(self.initial)


@dataclass(frozen=True)
class _Way(Schedule):
    """Base of schedules that go from `start` to `end` in stages; see `Exponential`."""

    start: float
    end: float
    steps: int
    stages: int = 4

    def __post_init__(self) -> None:
        way_out = f"{type(self).__name__}(0.25, 0.001, steps=2000) is a usual warm-up"
        for name in ("start", "end"):
            keep_number(self, name, "(0, inf)", way_out)
        keep_whole(self, "steps", 1, None, way_out)
        keep_whole(self, "stages", 1, self.steps, "write stages=steps for a value in each step")

    def at(self, step: int) -> float:
        """The value at a step."""
        if step >= self.steps:
            return float(self.end)
        return self._between(step * self.stages // self.steps / self.stages)

    def _between(self, share: float) -> float:
        """The value after this share of the way, in [0, 1)."""
        raise NotImplementedError

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)

    @property
    def final(self) -> float:
        return float(self.end)


@dataclass(frozen=True)
class Exponential(_Way):
    """start * (end / start) ** s, where s is the share of `steps`, in stages; then end.

    Deep Gradient Compression's warm-up: the kept fraction falls by the same factor from stage to
    stage. A value for each stage, not for each step, keeps message sizes equal for a while, which
    Horovod's response cache needs.

    Args:
        start: value at step 0.
        end: value from step `steps` on.
        steps: length of the way.
        stages: number of equal parts of the way, with one value each. `stages=steps`: a value for
            each step.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> warm_up = Exponential(0.25, 0.001, steps=400)
        >>> [round(warm_up.at(t), 4) for t in (0, 99, 100, 200, 300, 400, 10**6)]
        [0.25, 0.25, 0.0629, 0.0158, 0.004, 0.001, 0.001]

    References:
        Lin, Han, Mao, Wang, Dally: Deep Gradient Compression (ICLR 2018), Section 3.3.
    """

    def _between(self, share: float) -> float:
        return float(self.start * (self.end / self.start) ** share)


@dataclass(frozen=True)
class Linear(_Way):
    """start + (end - start) s, where s is the share of `steps`, in stages; then end.

    Args:
        start: value at step 0.
        end: value from step `steps` on.
        steps: length of the way.
        stages: number of equal parts of the way, with one value each. `stages=steps`: a value for
            each step.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> [Linear(8, 4, steps=8).at(t) for t in (0, 1, 2, 4, 6, 8)]
        [8.0, 8.0, 7.0, 6.0, 5.0, 4.0]
    """

    def _between(self, share: float) -> float:
        return float(self.start + (self.end - self.start) * share)


@dataclass(frozen=True)
class Piecewise(Schedule):
    """Constant pieces: each value holds from its step on.

    Args:
        pieces: {step: value}, with a value for step 0.

    Raises:
        ValueError: no value for step 0, or something else than whole steps and positive numbers.

    Example:
        >>> [Piecewise({0: 0.1, 1000: 0.01}).at(t) for t in (0, 999, 1000)]
        [0.1, 0.1, 0.01]
    """

    pieces: Any  # kept as ((step, value), ...), ascending

    def __post_init__(self) -> None:
        way_out = "write Piecewise({0: 0.1, 1000: 0.01})"
        given = self.pieces
        try:
            entries = given.items() if isinstance(given, Mapping) else given
            pairs = [(step, value) for step, value in entries]
        except (TypeError, ValueError):  # not a series of pairs
            pairs = []
        pieces = sorted(
            (
                whole("Piecewise", "step", step, 0, None, way_out),
                number("Piecewise", "value", value, "(0, inf)", way_out),
            )
            for step, value in pairs
        )
        if not pieces or pieces[0][0] != 0 or len(dict(pieces)) < len(pieces):
            raise ValueError(
                f"Piecewise got {given!r}, expected a value from step 0 on and one for each later "
                f"step at which it changes; {way_out}"
            )
        keep(self, "pieces", tuple(pieces))

    def __repr__(self) -> str:
        return f"Piecewise({dict(self.pieces)!r})"

    def at(self, step: int) -> float:
        """The value at a step."""
        return float(next(value for first, value in reversed(self.pieces) if first <= step))

    @property
    def bounds(self) -> tuple[float, float]:
        values = [value for _, value in self.pieces]
        return min(values), max(values)

    @property
    def final(self) -> float:
        return float(self.pieces[-1][1])


SCHEDULES: dict[str, type[Schedule]] = {
    kind.__name__: kind for kind in (Decay, Exponential, Linear, Piecewise)
}


def value_at(scheduled: Scheduled, step: int) -> float:
    """The value of a number or a schedule at a step."""
    return scheduled.at(step) if isinstance(scheduled, Schedule) else float(scheduled)


def keep_scheduled_number(
    owner: Any, name: str, interval: str, way_out: str, what: str = "a number"
) -> None:
    """Check a setting: a number in an interval, or a schedule of them.

    Of a schedule, the final value becomes the field. The schedule itself goes to
    `owner.schedules`, from which `owner.at(step)` makes the object of a step.

    Raises:
        ValueError: it is something else.
    """
    schedule = getattr(owner, name)
    if _fits(schedule, interval):
        _keep_apart(owner, name, schedule)
    keep_number(owner, name, interval, way_out, what, also=", or a schedule of them")


def keep_scheduled_whole(owner: Any, name: str, low: int, high: int | None, way_out: str) -> None:
    """The same for a whole number; a schedule's values are rounded.

    Raises:
        ValueError: it is something else.
    """
    schedule = getattr(owner, name)
    if _fits(schedule, f"[{low}, {math.inf if high is None else high}]"):
        _keep_apart(owner, name, schedule)
        keep(owner, name, round(getattr(owner, name)))
    keep_whole(owner, name, low, high, way_out)


def _fits(schedule: Any, interval: str) -> bool:
    return isinstance(schedule, Schedule) and all(
        is_in(value, interval) for value in (*schedule.bounds, schedule.final)
    )


def _keep_apart(owner: Any, name: str, schedule: Schedule) -> None:
    keep(owner, "schedules", (*owner.schedules, (name, schedule)))
    keep(owner, name, schedule.final)
