"""What the lines of a training log show to be wrong, with advice: each kind once."""

from __future__ import annotations

import math
from collections import deque
from itertools import pairwise
from statistics import median
from typing import Any

from ef_horovod.common.units import show_rate, show_seconds

_INTERVALS, _FEWEST_STEPS = 5, 100  # before time and bytes are judged
_SHARE = 0.5  # of a step, in compressing and decompressing
_WINDOW, _WINDOWS = 10, 5  # lines in a window, and windows, before growth is judged
_GROWTH, _LARGE = 2.0, 10.0  # of the error over the gradient: across the windows, and at the end
_LONG = 1000  # steps after which growth is told in any case


class Advice:
    """Looks at the lines of a log as they are written."""

    def __init__(self) -> None:
        self._counted: deque[dict[str, Any]] = deque(maxlen=_INTERVALS + 1)
        self._errors: deque[tuple[int, float, float]] = deque(maxlen=_WINDOW * _WINDOWS)
        self._given: set[str] = set()
        self._first: int | None = None  # step

    def look(self, entry: dict[str, Any]) -> list[str]:
        """New advice after a line, in sentences."""
        self._counted.append(entry)
        self._first = entry["step"] if self._first is None else self._first
        ratio = entry["error_norm"] / entry["gradient_norm"] if entry["gradient_norm"] else math.nan
        if math.isfinite(ratio):
            error = entry["relative_error"].get("total", math.nan)
            self._errors.append((entry["step"], ratio, error))
        found = {"cost": self._of_cost(), "growth": self._of_growth()}
        new = {kind: text for kind, text in found.items() if text and kind not in self._given}
        self._given |= set(new)
        return list(new.values())

    def _of_cost(self) -> str | None:
        first, last = self._counted[0], self._counted[-1]
        steps = last["step"] - first["step"]
        if len(self._counted) <= _INTERVALS or steps < _FEWEST_STEPS:
            return None
        spent = {name: last[name] - first[name] for name in _SPENT}
        working = spent["seconds_compress"] + spent["seconds_decompress"]
        sent, dense = spent["bytes_out"] / steps, spent["dense_bytes_out"] / steps
        if working > 0 and sent > dense:
            return (
                f"compression sent {sent:,.0f} bytes a step, expected fewer than the {dense:,.0f} "
                "of a dense allreduce; compress more, or take exchange='double_pass' or 'auto', "
                "or train without compression"
            )
        limit = break_even(dense, sent, working / steps)
        if not limit or working < _SHARE * spent["seconds"]:
            return None
        rate = show_rate(float(f"{limit:.2g}"))
        return (
            f"compressing and decompressing took {working / spent['seconds']:.0%} of the time "
            f"({show_seconds(working / steps)} a step), expected less than {_SHARE:.0%}; it pays "
            f"only if the network is slower than {rate}, so take a cheaper compressor, more "
            "threads per rank, or no compression (`ef-horovod advise` compares them)"
        )

    def _of_growth(self) -> str | None:
        if self._first is None or len(self._errors) < _WINDOW * _WINDOWS:
            return None
        seen = list(self._errors)
        middles = [
            median(ratio for _, ratio, _ in seen[i : i + _WINDOW])
            for i in range(0, len(seen), _WINDOW)
        ]
        grows = all(a < b for a, b in pairwise(middles))
        if not grows or middles[-1] < max(_LARGE, _GROWTH * middles[0]):
            return None
        # An error memory fills in about 1 / (part that is sent) steps; growth until then is normal.
        kept = 1 - median(error for _, _, error in seen[-_WINDOW:]) ** 2
        if seen[0][0] - self._first < min(_LONG, 3 / kept if kept > 0 else _LONG):
            return None
        steps = seen[-1][0] - seen[0][0]
        return (
            f"the compression error grew from {middles[0]:.3g} to {middles[-1]:.3g} times the "
            f"gradient's norm within {steps} steps, expected it to settle; send more (a larger "
            "ratio, a lower threshold), lower the learning rate, or take another method"
        )


_SPENT = ("seconds", "seconds_compress", "seconds_decompress", "bytes_out", "dense_bytes_out")


def break_even(dense: float, sent: float, seconds: float) -> float | None:
    """Bits per second of the network at which compression takes as long as it saves.

    On a faster network, sending the dense bytes takes less time than compressing. Work that
    overlaps is not considered: where dense sums overlap with backward, the true limit is lower.

    Args:
        dense: bytes of a dense allreduce.
        sent: bytes of the compressed exchange.
        seconds: for compressing and decompressing.

    Returns:
        None if compression takes no time; 0.0 if it saves no bytes.

    Example:
        >>> break_even(1_250_000, 0, 0.01)
        1000000000.0
    """
    return max(0.0, 8 * (dense - sent) / seconds) if seconds > 0 else None
