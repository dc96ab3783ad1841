"""Signs and exponents only, rounded at random."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from ef_horovod.arrays import Array
from ef_horovod.arrays.grid import bits_nbytes
from ef_horovod.arrays.keys import Key
from ef_horovod.compressors.base import Compressor
from ef_horovod.compressors.registry import register_compressor
from ef_horovod.compressors.shortening import add_shortened, shorten
from ef_horovod.wire import Fields

_LAYOUT = struct.Struct("<I")  # shift
_WIDTH = 9  # sign and exponent


@register_compressor(wire_id=9)
@dataclass(frozen=True)
class Natural(Compressor):
    """Round each entry at random to one of the two powers of two around it: 9 bits, E C(x) = x.

    omega = 1/8 for every x, so on average it is also a contraction with delta = 7/8. Powers of two
    and 0 do not change. The ends of the range differ. Entries above 2**127 are rounded down,
    because 2**128 is not a float32. In a vector with entries of 2**-62 or more, entries below
    2**-126 become 0 or 2**-126, which is unbiased but has a larger variance.

    Wire format:
        uint32 shift (0; 87 if all entries are below 2**-62), then the upper 9 bits of the float32
        x * 2**shift, after rounding, side by side, lowest bit first.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> ef.Natural().compress(numpy.array([4.0, -0.5, 0.0])).decompress()
        array([ 4. , -0.5,  0. ])

    References:
        Horvath, Ho, Horvath, Sahu, Canini, Richtarik: Natural Compression for Distributed Deep
        Learning (2019), Definition 1 and Theorem 2.
    """

    weighs_residual = True

    @property
    def unbiased(self) -> bool:
        return True

    def variance(self, d: int) -> float:
        return 1 / 8

    def contraction(self, d: int) -> float:
        return 7 / 8

    @classmethod
    def examples(cls) -> tuple[Natural, ...]:
        return (cls(),)

    def body_nbytes(self, d: int) -> int:
        return _LAYOUT.size + bits_nbytes(d, _WIDTH)

    def encode(self, x: Array, key: Key, *, residual: float) -> tuple[np.ndarray, ...]:
        return shorten(x, _WIDTH, key.draw(shared=False), self, residual=residual)

    @classmethod
    def least_nbytes(cls, d: int) -> int:
        return _LAYOUT.size + bits_nbytes(d, _WIDTH)

    @classmethod
    def accumulate(cls, body: np.ndarray, dense: Array, weight: float) -> None:
        fields = Fields(body, cls.__name__)
        (shift,) = fields.unpack(_LAYOUT)
        add_shortened(fields, shift, _WIDTH, cls.__name__, dense, weight)
