"""16-bit floating-point numbers, scaled so that none overflows or vanishes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.common.options import keep_choice
from ef_horovod.compressors.base import Compressor, require_finite
from ef_horovod.compressors.registry import register_compressor
from ef_horovod.errors import PayloadError
from ef_horovod.wire import Fields

_KINDS = ("float16", "bfloat16")
_MAX_SHIFT = 163  # brings the smallest float32, 2**-149, to 2**14


@register_compressor(wire_id=2)
@dataclass(frozen=True)
class Cast(Compressor):
    """Round to float16 or bfloat16 after scaling by the power of two that brings max|x| to 2**14.

    The scale makes it a contraction for every x. Plain float16 turns gradients above 65504 into
    infinities and those below 6e-8 into zeros.

    Args:
        dtype: "float16" (11 bits of precision) or "bfloat16" (8 bits).

    Raises:
        ValueError: another dtype.

    Wire format:
        int32 head (bit 0: 1 for bfloat16; the rest: shift), then d 16-bit numbers; x is about
        number * 2**-shift.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> ef.Cast("float16").compress(numpy.array([1e-9, -1e-9])).decompress()
        array([ 1.00044417e-09, -1.00044417e-09])
    """

    dtype: Literal["float16", "bfloat16"]

    def __post_init__(self) -> None:
        keep_choice(self, "dtype", _KINDS, "pick one")

    def contraction(self, d: int) -> float:
        # Squared unit roundoff 2**-22 or 2**-16, doubled to cover clipping and underflow.
        return 1 - (2.0**-21 if self.dtype == "float16" else 2.0**-15)

    @classmethod
    def examples(cls) -> tuple[Cast, ...]:
        return cls("float16"), cls("bfloat16")

    def body_nbytes(self, d: int) -> int:
        return 4 + 2 * d

    def encode(self, x: Array, key: Key, *, residual: bool) -> tuple[np.ndarray, ...]:
        xp = namespace(x)
        largest = xp.abs_max(x)
        require_finite(largest, self)
        shift = 15 - math.frexp(largest)[1] if largest else 0
        codes = xp.narrow(x, self.dtype, shift, subtract=residual)
        head = (shift << 1) | _KINDS.index(self.dtype)
        return np.array([head], "<i4"), codes.astype("<u2", copy=False)

    @classmethod
    def least_nbytes(cls, d: int) -> int:
        return 4 + 2 * d

    @classmethod
    def accumulate(cls, body: np.ndarray, dense: Array, weight: float) -> None:
        fields = Fields(body, cls.__name__)
        (head,) = fields.array("<i4", 1)
        codes = fields.array("<u2", dense.shape[0])
        fields.end()
        shift, kind = int(head) >> 1, _KINDS[int(head) & 1]
        if abs(shift) > _MAX_SHIFT:
            raise PayloadError(
                f"Cast payload has shift {shift}, expected at most {_MAX_SHIFT} either way; "
                "it was damaged on the way"
            )
        namespace(dense).add_widened(dense, codes, kind, shift, weight)
