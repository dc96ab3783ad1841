"""Reads and shows numbers with units: rates, times, counts."""

from __future__ import annotations

import math
import re

_MOST = 10**15  # bits per second, or the limit of a count
_LONGEST_SECONDS = 1e6
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


def read_rate(text: str) -> int:
    """Bits per second from text, with the units of `tc`.

    >>> read_rate("100mbit"), read_rate("2.5Gbit")
    (100000000, 2500000000)

    Raises:
        ValueError: the text is not a rate, or is below 64 kbit/s or above 1000 Tbit/s.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)bit", text.strip().lower())
    rate = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 64_000 <= rate <= _MOST:
        raise ValueError(
            f"got the rate {text[:80]!r}, expected 64kbit or more, as in 100mbit, up to 1000tbit"
        )
    return round(rate)


def show_rate(rate: float | None) -> str:
    """A rate with a unit.

    >>> show_rate(100_000_000), show_rate(2_500_000_000), show_rate(None)
    ('100 Mbit/s', '2.5 Gbit/s', 'no limit')
    """
    if rate is None:
        return "no limit"
    unit = next(unit for unit in "gmk" if rate >= _UNITS[unit] or unit == "k")
    return f"{rate / _UNITS[unit]:g} {unit.upper() if unit != 'k' else unit}bit/s"


def read_seconds(text: str) -> float:
    """Seconds from text with a unit.

    >>> read_seconds("60ms"), read_seconds("0.5s")
    (0.06, 0.5)

    Raises:
        ValueError: the text is not a time, has no unit, or is above a million seconds.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ns|us|ms|s)", text.strip())
    seconds = float(found[1]) * _SECONDS[found[2]] if found else math.inf
    if seconds > _LONGEST_SECONDS:
        raise ValueError(
            f"got the time {text[:80]!r}, expected a number with a unit, as in 60ms or 2s, and at "
            "most 1000000s"
        )
    return seconds


def show_seconds(seconds: float) -> str:
    """A time with three digits.

    >>> show_seconds(0.0613), show_seconds(2.0), show_seconds(5e-5), show_seconds(0.0)
    ('61.3 ms', '2 s', '50 us', '0 s')
    """
    unit = next((u for u in ("s", "ms", "us") if seconds >= _SECONDS[u]), "us" if seconds else "s")
    value = seconds / _SECONDS[unit]
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def read_count(text: str) -> int:
    """A count from text; a letter at the end means thousands, millions and so on.

    >>> read_count("3.6M"), read_count("25_000")
    (3600000, 25000)

    Raises:
        ValueError: the text is not a count, or is below 1 or above 10**15.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtb]?)", text.strip().lower().replace("_", ""))
    count = float(found[1]) * {**_UNITS, "b": 1e9}[found[2]] if found else 0.0
    if not 0.5 < count <= _MOST:
        raise ValueError(
            f"got {text[:80]!r}, expected a count of 1 or more, up to 1000T, as in 3.6M"
        )
    return round(count)
