"""Checks of options' types and ranges, with error messages of one form.

    QSGD got levels=1.5, expected a whole number from 1 to 32767; 7 is a good start

Numbers of Python and NumPy are accepted and become plain Python numbers, because ranks compare
configs as text. True, False and strings are not numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_LONGEST_SHOWN = 200  # characters of the given value
LARGEST_FIELD = 2**31 - 1  # of a 32-bit field on the wire


def whole(owner: str, name: str, value: Any, low: int, high: int | None, way_out: str) -> int:
    """A whole number from `low` to `high`, as an int.

    Args:
        owner: the class or function that the option belongs to.
        name: of the option.
        value: the given value.
        low, high: bounds, both included; None for no upper bound.
        way_out: advice at the end of the message.

    Raises:
        ValueError: the value is something else.

    Example:
        >>> whole("TopK", "k", 10, 1, None, "use ratio= for a fraction")
        10
    """
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        plain = int(value)
        if low <= plain and (high is None or plain <= high):
            return plain
    bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
    raise _wrong(owner, name, value, f"a whole number {bounds}", way_out)


def number(
    owner: str,
    name: str,
    value: Any,
    interval: str,
    way_out: str,
    what: str = "a number",
    *,
    also: str = "",
) -> float:
    """A number in an interval, as Python's int or float.

    Args:
        owner, name, value, way_out: as in `whole`.
        interval: "(0, 1]", "[0, inf)": a round bracket excludes the bound.
        what: name of the number in the message.
        also: other allowed values; the error message lists them.

    Raises:
        ValueError: the value is something else.

    Example:
        >>> number("PAGE", "probability", 0.5, "(0, 1]", "0.1 is usual")
        0.5
    """
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        plain = int(value) if isinstance(value, (int, np.integer)) else float(value)
        if is_in(plain, interval):
            return plain
    raise _wrong(owner, name, value, f"{what} in {interval}{also}", way_out)


def choice(owner: str, name: str, value: Any, choices: Sequence[str], way_out: str) -> str:
    """A word out of `choices`.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str) and value in choices:
        return value
    raise _wrong(owner, name, value, f"one of {tuple(choices)}", way_out)


def flag(owner: str, name: str, value: Any) -> bool:
    """True or False.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise _wrong(owner, name, value, "True or False", "write one of them")


def seed_of(owner: str, value: Any) -> int:
    """A seed of random draws.

    Raises:
        ValueError: it is not a whole number of 64 bits.
    """
    return whole(owner, "seed", value, -(2**63), 2**64 - 1, "0 is the default")


def keep(owner: Any, name: str, value: Any) -> None:
    """Set a field of a frozen dataclass to its checked value."""
    object.__setattr__(owner, name, value)


def keep_whole(
    owner: Any, name: str, low: int, high: int | None, way_out: str, *, optional: bool = False
) -> None:
    """Check a field of a frozen dataclass as `whole` does; `optional` allows None.

    Raises:
        ValueError: it is something else.
    """
    value = getattr(owner, name)
    if not (optional and value is None):
        keep(owner, name, whole(_name_of(owner), name, value, low, high, way_out))


def keep_block(owner: Any, name: str, *, optional: bool = True) -> None:
    """Check a field with the number of entries of a block; None is the whole vector.

    Raises:
        ValueError: it is something else.
    """
    way_out = "leave it out for one block" if optional else "choose one"
    keep_whole(owner, name, 1, LARGEST_FIELD, way_out, optional=optional)


def keep_number(
    owner: Any,
    name: str,
    interval: str,
    way_out: str,
    what: str = "a number",
    *,
    optional: bool = False,
    also: str = "",
) -> None:
    """Check a field of a frozen dataclass as `number` does; `optional` allows None.

    Raises:
        ValueError: it is something else.
    """
    value = getattr(owner, name)
    if not (optional and value is None):
        keep(owner, name, number(_name_of(owner), name, value, interval, way_out, what, also=also))


def keep_choice(owner: Any, name: str, choices: Sequence[str], way_out: str) -> None:
    """Check a field of a frozen dataclass as `choice` does.

    Raises:
        ValueError: it is something else.
    """
    keep(owner, name, choice(_name_of(owner), name, getattr(owner, name), choices, way_out))


def keep_flag(owner: Any, name: str) -> None:
    """Check a field of a frozen dataclass as `flag` does.

    Raises:
        ValueError: it is something else.
    """
    keep(owner, name, flag(_name_of(owner), name, getattr(owner, name)))


def keep_seed(owner: Any) -> None:
    """Check the field `seed` of a frozen dataclass.

    Raises:
        ValueError: it is not a seed.
    """
    keep(owner, "seed", seed_of(_name_of(owner), owner.seed))


def _name_of(owner: Any) -> str:
    return getattr(owner, "shown_as", "") or type(owner).__name__


def is_in(value: float, interval: str) -> bool:
    """Whether a number is in an interval; NaN is in none."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = low < value if interval[0] == "(" else low <= value
    below = value < high if interval[-1] == ")" else value <= high
    return above and below and not math.isnan(value)


def _wrong(owner: str, name: str, value: Any, expected: str, way_out: str) -> ValueError:
    shown = " ".join(repr(value).split())
    shown = shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}..."
    return ValueError(f"{owner} got {name}={shown}, expected {expected}; {way_out}")
