"""Three values: minus the largest magnitude, zero, plus the largest magnitude."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.grid import Grid, blocks
from ef_horovod.arrays.keys import Key
from ef_horovod.common.options import keep_block, keep_number
from ef_horovod.compressors.base import Compressor
from ef_horovod.compressors.registry import register_compressor
from ef_horovod.compressors.rounding import (
    add_rounded,
    block_length,
    contraction_of,
    read_block,
    scale_of,
)
from ef_horovod.wire import Fields

_LAYOUT = struct.Struct("<I")  # bucket (0: the whole vector)
_GRID = Grid("ternary", 1)


@register_compressor(wire_id=8)
@dataclass(frozen=True)
class TernGrad(Compressor):
    """C(x)_i = M sign(x_i) with probability |x_i| / M, else 0, where M = max |x_i|: 1.6 bits.

    Unbiased, with a variance of exactly M ||x||_1 / ||x||^2 - 1. For b entries with a common M it
    is at most (sqrt(b) - 1) / 2 for every x. One large entry raises the variance of all others in
    its bucket; buckets and clipping limit this effect.

    With a clip, ||x - C(x)|| / ||x|| has no bound below 1, but error feedback is stable. In a
    bucket of b entries the largest magnitude shrinks on average: E max |x - C(x)| <=
    (1 - q / 2) max |x| with q = min(clip / sqrt(b), 1 / (2 b)). Reason: x is cut to M >=
    min(1, clip / sqrt(b)) max |x|, entries above M lose M, and each other entry ends above
    (1 - 1 / (2 b)) M with a probability of at most 1 / (2 b). Without a clip it is unbiased and
    needs no error memory. `Scaled` makes it a contraction, with a smaller error memory.

    Args:
        clip: cut x to +-clip standard deviations first, taken about 0 within a bucket (2.5 in the
            paper), or None. C is then biased, without a bound that holds for every x.
        bucket: entries that share an M, or None for the whole vector.

    Raises:
        ValueError: clip is not positive, or bucket is out of range.

    Wire format:
        uint32 bucket (0: the whole vector), float32 M for each bucket, then digits of base 3, five
        in a byte, the first the lowest: 0 for 0, 1 for M, 2 for -M.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> ef.TernGrad().compress(numpy.array([2.0, -2.0, 0.0])).decompress()
        array([ 2., -2.,  0.])

    References:
        Wen et al.: TernGrad (NeurIPS 2017), Sections 3.1 and 3.3.
    """

    clip: float | None = None
    bucket: int | None = None

    def __post_init__(self) -> None:
        keep_block(self, "bucket")
        what, way_out = "a number of standard deviations", "the paper takes 2.5"
        keep_number(self, "clip", "(0, inf)", way_out, what, optional=True)

    weighs_residual = True

    @property
    def unbiased(self) -> bool:
        return self.clip is None

    @property
    def supports_error_feedback(self) -> bool:
        return self.clip is not None or super().supports_error_feedback

    def variance(self, d: int) -> float | None:
        # With M = 1 and one entry at 1, (1 + (b-1) t) / (1 + (b-1) t^2) - 1 is largest where all
        # others are t = 1 / (1 + sqrt(b)).
        return (math.sqrt(block_length(self.bucket, d)) - 1) / 2 if self.unbiased else None

    def contraction(self, d: int) -> float | None:
        omega = self.variance(d)
        return None if omega is None else contraction_of(omega)

    @classmethod
    def examples(cls) -> tuple[TernGrad, ...]:
        return cls(), cls(clip=2.5, bucket=512)

    def body_nbytes(self, d: int) -> int:
        scales = 4 * blocks(d, block_length(self.bucket, d))
        return _LAYOUT.size + scales + _GRID.nbytes(d)

    def encode(self, x: Array, key: Key, *, residual: float) -> tuple[np.ndarray, ...]:
        xp, block = namespace(x), block_length(self.bucket, x.shape[0])
        scales = scale_of(self._largest(x, block), self)
        codes = xp.quantize(x, scales, block, _GRID, key.draw(shared=False), subtract=residual)
        head = np.frombuffer(_LAYOUT.pack(self.bucket or 0), np.uint8)
        return head, scales, codes

    def _largest(self, x: Array, block: int) -> np.ndarray:
        """float64[blocks]: M. Larger entries are rounded to it, which is the clipping."""
        xp, d = namespace(x), x.shape[0]
        largest = xp.block_max(x, block).astype(np.float64)
        if self.clip is None:
            return largest
        lengths = np.minimum(block, d - block * np.arange(largest.size))
        deviations = np.sqrt(xp.block_squares(x, block) / lengths)
        return np.minimum(largest, self.clip * deviations)  # NaN wins

    @classmethod
    def least_nbytes(cls, d: int) -> int:
        return _LAYOUT.size + _GRID.nbytes(d)

    @classmethod
    def accumulate(cls, body: np.ndarray, dense: Array, weight: float) -> None:
        fields = Fields(body, cls.__name__)
        (bucket,) = fields.unpack(_LAYOUT)
        block = read_block(bucket, cls.__name__, dense.shape[0])
        add_rounded(fields, cls.__name__, _GRID, block, dense, weight)
