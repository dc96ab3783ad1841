"""Fewer mantissa bits, packed without gaps."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from ef_horovod.arrays import Array
from ef_horovod.arrays.grid import bits_nbytes
from ef_horovod.arrays.keys import Key
from ef_horovod.common.schedules import keep_scheduled_whole
from ef_horovod.compressors.base import Compressor
from ef_horovod.compressors.registry import register_compressor
from ef_horovod.compressors.shortening import add_shortened, shorten
from ef_horovod.errors import PayloadError
from ef_horovod.wire import Fields

_LAYOUT = struct.Struct("<II")  # shift, bits
_MAX_BITS = 22


@register_compressor(wire_id=6)
@dataclass(frozen=True)
class TruncateMantissa(Compressor):
    """Keep m mantissa bits of each entry and drop the rest: 9 + m bits, rounded towards zero.

    No entry loses more than 1 / (2**m + 1) of itself, so C is a contraction with 1 - delta =
    (2**m + 1)**-2, below the 4**-m of the simpler bound. Signs are kept, and no magnitude grows.

    Args:
        bits: m, from 0 (the power of two below each entry) to 22. 7 is bfloat16's precision.

    Raises:
        ValueError: bits out of range.

    Wire format:
        uint32 shift (0; 87 if all entries are below 2**-62), uint32 bits, then the upper 9 + bits
        bits of the float32 x * 2**shift side by side, lowest bit first.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> ef.TruncateMantissa(bits=2).compress(numpy.array([1.23456, -7.9, 0.0])).decompress()
        array([ 1., -7.,  0.])

    References:
        Tang, Yu, Lian, Zhang, Liu: DoubleSqueeze (ICML 2019), Section 3.2, "Clipping".
    """

    bits: int | Any

    def __post_init__(self) -> None:
        keep_scheduled_whole(self, "bits", 0, _MAX_BITS, "7 is bfloat16's precision")

    def contraction(self, d: int) -> float:
        return 1 - (2.0**self.bits + 1) ** -2

    @classmethod
    def examples(cls) -> tuple[TruncateMantissa, ...]:
        return cls(3), cls(10)

    def body_nbytes(self, d: int) -> int:
        return _LAYOUT.size + bits_nbytes(d, 9 + self.bits)

    def encode(self, x: Array, key: Key, *, residual: bool) -> tuple[np.ndarray, ...]:
        shift, codes = shorten(x, 9 + self.bits, None, self, residual=residual)
        return shift, np.array([self.bits], "<u4"), codes

    @classmethod
    def least_nbytes(cls, d: int) -> int:
        return _LAYOUT.size + bits_nbytes(d, 9)

    @classmethod
    def accumulate(cls, body: np.ndarray, dense: Array, weight: float) -> None:
        fields = Fields(body, cls.__name__)
        shift, bits = fields.unpack(_LAYOUT)
        if bits > _MAX_BITS:
            raise PayloadError(
                f"TruncateMantissa payload has {bits} bits of mantissa, expected at most "
                f"{_MAX_BITS}; it was damaged on the way"
            )
        add_shortened(fields, shift, 9 + bits, cls.__name__, dense, weight)
