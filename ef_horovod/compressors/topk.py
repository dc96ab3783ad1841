"""The k entries of largest magnitude."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.compressors import sparse
from ef_horovod.compressors.base import Compressor, require_finite
from ef_horovod.compressors.density import kept, require_ratio
from ef_horovod.keys import Key
from ef_horovod.registry import register_compressor


@register_compressor(wire_id=3)
@dataclass(frozen=True)
class TopK(Compressor):
    """Keep the k largest |x_i| exactly; among equal magnitudes the lower index wins.

    Args:
        ratio: kept fraction in (0, 1], k = max(1, floor(ratio * d)); smaller is more aggressive.
        k: or the number of kept entries itself, at least 1.

    Raises:
        ValueError: not exactly one of ratio and k, or out of range.

    Wire format:
        uint32 k, the code of the k ascending indices (docs/wire-format.md), then k float32
        values. At 1 % density 40.2 bits a kept entry: 1/79.6 of float32.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> ef.TopK(ratio=0.5).compress(numpy.array([3.0, -1.0, 2.0, -4.0])).decompress()
        array([ 3.,  0.,  0., -4.])

    References:
        Stich, Cordonnier, Jaggi: Sparsified SGD with Memory (NeurIPS 2018), Definition 2.1:
        a contraction with delta = k / d.
    """

    ratio: float | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.k is None):
            raise ValueError(
                f"TopK got ratio={self.ratio} and k={self.k}, expected exactly one of them; "
                "write TopK(ratio=0.01) or TopK(k=1000)"
            )
        if self.ratio is not None:
            require_ratio("TopK", self.ratio)
        elif self.k is not None and self.k < 1:
            raise ValueError(f"TopK got k={self.k}, expected at least 1; use ratio= for a fraction")

    def contraction(self, d: int) -> float:
        return kept(self.ratio, self.k, d) / max(d, 1)

    @classmethod
    def examples(cls) -> tuple[TopK, ...]:
        return cls(ratio=0.01), cls(ratio=0.2), cls(k=3)

    def body_nbytes(self, d: int) -> int:
        k = kept(self.ratio, self.k, d)
        return sparse.body_nbytes(k, d)

    def encode(self, x: Array, key: Key, *, residual: bool) -> tuple[np.ndarray, ...]:
        indices, values = namespace(x).top_k(x, kept(self.ratio, self.k, x.shape[0]))
        require_finite(values, self)  # NaN and infinity rank above all numbers, so they are here
        return sparse.encode(x, indices, values, residual=residual)

    @classmethod
    def accumulate(cls, body: np.ndarray, dense: Array, weight: float) -> None:
        sparse.accumulate(body, dense, weight, cls.__name__)
