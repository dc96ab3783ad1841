"""No compression: the reference for all other compressors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.compressors.base import Compressor, require_finite
from ef_horovod.compressors.registry import register_compressor
from ef_horovod.wire import Fields


@register_compressor(wire_id=1)
@dataclass(frozen=True)
class Identity(Compressor):
    """C(x) = x, as float32.

    Wire format:
        d float32 values.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> ef.Identity().compress(numpy.ones(10)).nbytes
        56
    """

    @property
    def allreducible(self) -> bool:
        return True

    @property
    def unbiased(self) -> bool:
        return True

    def contraction(self, d: int) -> float:
        return 1.0

    def variance(self, d: int) -> float:
        return 0.0

    @classmethod
    def examples(cls) -> tuple[Identity, ...]:
        return (cls(),)

    def body_nbytes(self, d: int) -> int:
        return 4 * d

    def encode(self, x: Array, key: Key, *, residual: bool) -> tuple[np.ndarray, ...]:
        xp = namespace(x)
        require_finite(xp.abs_max(x), self)
        values = np.array(xp.to_host(x), "<f4")  # a copy: the payload must not change with x
        if residual:
            xp.fill(x, 0.0)
        return (values,)

    @classmethod
    def least_nbytes(cls, d: int) -> int:
        return 4 * d

    @classmethod
    def accumulate(cls, body: np.ndarray, dense: Array, weight: float) -> None:
        xp = namespace(dense)
        fields = Fields(body, cls.__name__)
        values = fields.array("<f4", dense.shape[0])
        fields.end()
        xp.add(dense, xp.from_host(values, getattr(dense, "device", None)), weight)

    @classmethod
    def summands(cls, body: np.ndarray) -> np.ndarray:
        return body.view("<f4")
