"""Random rounding to evenly spaced levels of a block's l2 norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.compressors.registry import register_compressor
from ef_horovod.compressors.rounding import RoundsToLevels, block_length


@register_compressor(wire_id=7)
@dataclass(frozen=True)
class QSGD(RoundsToLevels):
    """Round |x_i| / ||x|| at random to 0, 1/s, ..., 1 so that E C(x) = x; a norm for each bucket.

    Fixed width: 1 + ceil(log2(s + 1)) bits per entry, 4.06 at s = 7 in buckets of 512. If omega
    is below 1, it is a contraction on average and suits error feedback. With fewer levels, use it
    without error feedback.

    Args:
        levels: s, from 1 to 32767. Powers of two minus 1 use all codes of their width.
        bucket: entries that share a norm, or None for the whole vector. Larger buckets increase
            omega.

    Raises:
        ValueError: levels or bucket out of range.

    Wire format:
        uint32 levels, uint32 bucket (0: the whole vector), float32 norm / levels for each bucket,
        rounded up, then codes of 1 + ceil(log2(levels + 1)) bits side by side, lowest bit first:
        the level, above it 1 for a negative sign.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> ef.QSGD(levels=5).compress(numpy.array([3.0, 0.0, -4.0])).decompress()
        array([ 3.,  0., -4.])

    References:
        Alistarh, Grubic, Li, Tomioka, Vojnovic: QSGD (NeurIPS 2017), Section 3.1 and Lemma 3.1;
        the paper codes levels with Elias codes, which have no fixed size.
    """

    grid = "uniform"
    max_levels = 2**15 - 1
    levels: int | Any
    bucket: int | None = 512

    def variance(self, d: int) -> float:
        b, s = block_length(self.bucket, d), self.levels
        return min(b / s**2, math.sqrt(b) / s)

    @classmethod
    def examples(cls) -> tuple[QSGD, ...]:
        return cls(7), cls(100, bucket=None)

    def lowest(self, x: Array, block: int) -> np.ndarray:
        return np.sqrt(namespace(x).block_squares(x, block)) / self.levels
