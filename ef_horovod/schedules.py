"""Numbers that follow from the step: what depends on time, equal on all ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decay:
    """initial * (offset / (offset + t)) ** power at step t = 0, 1, ...

    Args:
        power: 2/3 for STORM, 1 for ROOT-SGD's 1 / (t + 1), 0 for a constant.
        initial: value at t = 0.
        offset: steps that it takes to fall to 2 ** -power of it.

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
        if self.power < 0 or not self.initial > 0 or not self.offset > 0:
            raise ValueError(
                f"got {self}, expected power >= 0 and initial and offset above 0; Decay(power=1) "
                "is 1, 1/2, 1/3, ..."
            )

    def at(self, step: int) -> float:
        """The value at a step."""
        return float(self.initial * (self.offset / (self.offset + step)) ** self.power)


Schedule = float | Decay


def value_at(schedule: Schedule, step: int) -> float:
    """The value of a number or a schedule at a step."""
    return schedule.at(step) if isinstance(schedule, Decay) else float(schedule)


def require_weight(what: str, schedule: Schedule) -> None:
    """Raise unless a schedule stays in (0, 1]; it never rises, so its start tells.

    Raises:
        ValueError: it does not.
    """
    if not 0 < value_at(schedule, 0) <= 1:
        raise ValueError(
            f"got {what}={schedule!r}, expected a weight in (0, 1] or a Decay that starts there; "
            "0.1 averages over about ten steps"
        )
