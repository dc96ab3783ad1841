"""The k entries of largest magnitude."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.compressors.base import Compressor, require_finite
from ef_horovod.compressors.density import kept, require_ratio
from ef_horovod.errors import PayloadError
from ef_horovod.keys import Key
from ef_horovod.registry import register_compressor
from ef_horovod.wire import Fields, decode_indices, encode_indices, indices_nbytes

_LAYOUT = struct.Struct("<I")  # k


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
        uint32 k, the Elias-Fano code of the k ascending indices (docs/wire-format.md), then k
        float32 values. At 1 % density 40.6 bits a kept entry: 1/79 of float32.

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
        return _LAYOUT.size + indices_nbytes(k, d) + 4 * k

    def encode(self, x: Array, key: Key, *, residual: bool) -> tuple[np.ndarray, ...]:
        xp, d = namespace(x), x.shape[0]
        indices, values = xp.top_k(x, kept(self.ratio, self.k, d))
        require_finite(values, self)  # NaN and infinity rank above all numbers, so they are here
        if residual:
            xp.scatter_put(x, indices, np.zeros_like(values))
        head = np.frombuffer(_LAYOUT.pack(indices.size), np.uint8)
        return head, encode_indices(indices, d), values.astype("<f4", copy=False)

    @classmethod
    def accumulate(cls, body: np.ndarray, dense: Array, weight: float) -> None:
        fields = Fields(body, cls.__name__)
        (k,) = fields.unpack(_LAYOUT)
        if k > dense.shape[0]:
            raise PayloadError(
                f"TopK payload has {k} entries, expected at most {dense.shape[0]}; "
                "it was damaged on the way"
            )
        code = fields.array("u1", indices_nbytes(k, dense.shape[0]))
        values = fields.array("<f4", k)
        fields.end()
        namespace(dense).scatter_add(dense, decode_indices(code, k, dense.shape[0]), values, weight)
