"""Random rounding to evenly spaced levels of a block's l2 norm."""

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
_MAX_LEVELS = 2**15 - 1


@register_compressor(wire_id=7)
@dataclass(frozen=True)
class QSGD(Compressor):
    """Round |x_i| / ||x|| at random to 0, 1/s, ..., 1 so that E C(x) = x; a norm for each bucket.

    Fixed width: 1 + ceil(log2(s + 1)) bits an entry, 4.06 at s = 7 in buckets of 512. Where omega
    stays below 1 it is a contraction on average and suits error feedback; with fewer levels use
    it without.

    Args:
        levels: s, from 1 to 32767. Powers of two less 1 use all codes of their width.
        bucket: entries that share a norm, or None for the whole vector; omega grows with it.

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

    levels: int
    bucket: int | None = 512

    def __post_init__(self) -> None:
        require_range("QSGD: levels", self.levels, 1, _MAX_LEVELS)
        require_block("QSGD: bucket", self.bucket)

    weighs_residual = True

    @property
    def unbiased(self) -> bool:
        return True

    def variance(self, d: int) -> float:
        b, s = block_length(self.bucket, d), self.levels
        return min(b / s**2, math.sqrt(b) / s)

    def contraction(self, d: int) -> float | None:
        return contraction_of(self.variance(d))

    @classmethod
    def examples(cls) -> tuple[QSGD, ...]:
        return cls(7), cls(100, bucket=None)

    @property
    def _grid(self) -> Grid:
        return Grid("uniform", self.levels)

    def body_nbytes(self, d: int) -> int:
        scales = 4 * blocks(d, block_length(self.bucket, d))
        return _LAYOUT.size + scales + self._grid.nbytes(d)

    def encode(self, x: Array, key: Key, *, residual: float) -> tuple[np.ndarray, ...]:
        xp, block = namespace(x), block_length(self.bucket, x.shape[0])
        scales = scale_of(np.sqrt(xp.block_squares(x, block)) / self.levels, self)
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
                f"QSGD payload has {levels} levels, expected 1 to {_MAX_LEVELS}; "
                "it was damaged on the way"
            )
        block = read_block(bucket, cls.__name__, dense.shape[0])
        add_rounded(fields, cls.__name__, Grid("uniform", levels), block, dense, weight)
