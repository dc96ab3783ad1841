"""Number of entries that a sparsifier keeps, from a ratio or a count."""

from __future__ import annotations

from typing import Any

from ef_horovod.common.schedules import keep_scheduled_number


def kept(ratio: float | None, k: int | None, d: int) -> int:
    """Number of kept entries of d: k, or max(1, floor(ratio * d)); at most d."""
    if k is None:
        assert ratio is not None
        k = max(1, int(ratio * d))
    return min(k, d)


def keep_ratio(compressor: Any) -> None:
    """Check the field `ratio`: a fraction in (0, 1], or a schedule of them.

    Raises:
        ValueError: it is something else.
    """
    way_out = "0.01 keeps one entry in a hundred"
    keep_scheduled_number(compressor, "ratio", "(0, 1]", way_out, "a kept fraction")
