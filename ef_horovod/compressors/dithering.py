"""Random rounding to levels that halve from one to the next."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.grid import Grid, blocks
from ef_horovod.compressors.base import Compressor
from ef_horovod.compressors.rounding import (
    add_rounded,
    block_length,
    contraction_of,
    read_block,
    require_block,
    require_range,
    scale_of,
)
from ef_horovod.errors import PayloadError
from ef_horovod.keys import Key
from ef_horovod.registry import register_compressor
from ef_horovod.wire import Fields

_LAYOUT = struct.Struct("<II")  # levels, bucket (0: the whole vector)
_MAX_LEVELS = 127


@register_compressor(wire_id=10)
@dataclass(frozen=True)
class NaturalDithering(Compressor):
    """Round |x_i| / ||x||_p at random to 0, 2**(1-s), ..., 1/2, 1 so that E C(x) = x.

    Levels are dense where most entries are, so few do: 4 bits an entry at s = 7, where QSGD's
    omega is ten times larger. omega <= 1/8 + A min(1, A) with A = sqrt(b) 2**(1-s) for buckets of
    b entries; where it is below 1, this is a contraction on average.

    Args:
        levels: s, from 1 to 127.
        norm: 2, or math.inf for the largest magnitude: a smaller error, with the same bound.
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

    levels: int
    norm: float = 2
    bucket: int | None = None

    def __post_init__(self) -> None:
        require_range("NaturalDithering: levels", self.levels, 1, _MAX_LEVELS)
        require_block("NaturalDithering: bucket", self.bucket)
        if self.norm not in (2, math.inf):
            raise ValueError(
                f"NaturalDithering got norm={self.norm!r}, expected 2 or math.inf; choose one"
            )

    weighs_residual = True

    @property
    def unbiased(self) -> bool:
        return True

    def variance(self, d: int) -> float:
        a = math.sqrt(block_length(self.bucket, d)) * 2.0 ** (1 - self.levels)
        return 1 / 8 + a * min(1, a)

    def contraction(self, d: int) -> float | None:
        return contraction_of(self.variance(d))

    @classmethod
    def examples(cls) -> tuple[NaturalDithering, ...]:
        return cls(7, bucket=512), cls(4, norm=math.inf)

    @property
    def _grid(self) -> Grid:
        return Grid("powers", self.levels)

    def body_nbytes(self, d: int) -> int:
        scales = 4 * blocks(d, block_length(self.bucket, d))
        return _LAYOUT.size + scales + self._grid.nbytes(d)

    def encode(self, x: Array, key: Key, *, residual: float) -> tuple[np.ndarray, ...]:
        xp, block = namespace(x), block_length(self.bucket, x.shape[0])
        if self.norm == 2:
            norms = np.sqrt(xp.block_squares(x, block))
        else:
            norms = xp.block_max(x, block).astype(np.float64)
        scales = scale_of(norms * 2.0 ** (1 - self.levels), self)
        seed = key.draw(shared=False)
        codes = xp.quantize(x, scales, block, self._grid, seed, subtract=residual)
        head = np.frombuffer(_LAYOUT.pack(self.levels, self.bucket or 0), np.uint8)
        return head, scales, codes

    @classmethod
    def accumulate(cls, body: np.ndarray, dense: Array, weight: float) -> None:
        fields = Fields(body, cls.__name__)
        levels, bucket = fields.unpack(_LAYOUT)
        if not 1 <= levels <= _MAX_LEVELS:
            raise PayloadError(
                f"NaturalDithering payload has {levels} levels, expected 1 to {_MAX_LEVELS}; "
                "it was damaged on the way"
            )
        block = read_block(bucket, cls.__name__, dense.shape[0])
        add_rounded(fields, cls.__name__, Grid("powers", levels), block, dense, weight)
