"""Random rounding to levels that are powers of two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.common.options import keep_number
from ef_horovod.compressors.registry import register_compressor
from ef_horovod.compressors.rounding import RoundsToLevels, block_length


@register_compressor(wire_id=10)
@dataclass(frozen=True)
class NaturalDithering(RoundsToLevels):
    """Round |x_i| / ||x||_p at random to 0, 2**(1-s), ..., 1/2, 1 so that E C(x) = x.

    Levels are dense where most entries are, so few levels suffice: 4 bits per entry at s = 7, where
    QSGD's omega is ten times larger. omega <= 1/8 + A min(1, A) with A = sqrt(b) 2**(1-s) for
    buckets of b entries. If it is below 1, this is a contraction on average.

    Args:
        levels: s, from 1 to 127.
        norm: 2, or math.inf for the largest magnitude, which gives a smaller error with the same
            bound.
        bucket: entries that share a norm, or None for the whole vector.

    Raises:
        ValueError: levels, norm or bucket out of range.

    Wire format:
        uint32 levels, uint32 bucket (0: the whole vector), float32 norm * 2**(1-levels) for each
        bucket, rounded up, then codes of 1 + ceil(log2(levels + 1)) bits side by side, lowest bit
        first: level j for the number * 2**(j-1), 0 for 0; above it 1 for a negative sign.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> ef.NaturalDithering(3, norm=numpy.inf).compress(numpy.array([4.0, -2.0, 0.0])).nbytes
        30

    References:
        Horvath, Ho, Horvath, Sahu, Canini, Richtarik: Natural Compression for Distributed Deep
        Learning (2019), Definition 2 and Theorem 7.
    """

    grid = "powers"
    max_levels = 127
    levels: int | Any
    norm: float = 2
    bucket: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        keep_number(self, "norm", "[2, inf]", "2 and math.inf are the two that there are")
        if self.norm not in (2, math.inf):
            raise ValueError(
                f"NaturalDithering got norm={self.norm!r}, expected 2 or math.inf; choose one"
            )

    def variance(self, d: int) -> float:
        a = math.sqrt(block_length(self.bucket, d)) * 2.0 ** (1 - self.levels)
        return 1 / 8 + a * min(1, a)

    @classmethod
    def examples(cls) -> tuple[NaturalDithering, ...]:
        return cls(7, bucket=512), cls(4, norm=math.inf)

    def lowest(self, x: Array, block: int) -> np.ndarray:
        xp = namespace(x)
        if self.norm == 2:
            norms = np.sqrt(xp.block_squares(x, block))
        else:
            norms = xp.block_max(x, block).astype(np.float64)
        return norms * 2.0 ** (1 - self.levels)
