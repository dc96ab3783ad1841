"""One bit an entry: the sign, and one scale for all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.compressors.base import Compressor, require_finite
from ef_horovod.errors import PayloadError
from ef_horovod.keys import Key
from ef_horovod.registry import register_compressor
from ef_horovod.wire import Fields


@register_compressor(wire_id=5)
@dataclass(frozen=True)
class OneBit(Compressor):
    """C(x) = (||x||_1 / d) sign(x), with sign(0) = +1: about 1/32 of float32.

    The mean magnitude is the least-squares best scale for given signs, and makes C a contraction
    for every x != 0: ||C(x) - x||^2 = ||x||^2 - ||x||_1^2 / d. Use it with error feedback.

    Wire format:
        float32 scale, then ceil(d / 8) bytes: bit j of byte i is set if x[8i + j] >= 0.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> ef.OneBit().compress(numpy.array([1.0, -2.0, 3.0, -4.0])).decompress()
        array([ 2.5, -2.5,  2.5, -2.5])

    References:
        Karimireddy, Rebjock, Stich, Jaggi: Error Feedback Fixes SignSGD (ICML 2019), Algorithm 1
        and Lemma 8. Seide et al.: 1-Bit Stochastic Gradient Descent (Interspeech 2014).
    """

    def contraction(self, d: int) -> float:
        return 1.0 / max(d, 1)  # the worst case, one entry different from zero

    @classmethod
    def examples(cls) -> tuple[OneBit, ...]:
        return (cls(),)

    def body_nbytes(self, d: int) -> int:
        return 4 + (d + 7) // 8

    def encode(self, x: Array, key: Key, *, residual: bool) -> tuple[np.ndarray, ...]:
        xp = namespace(x)
        total = xp.abs_sum(x)
        require_finite(total, self)
        scale = np.float32(total / max(x.shape[0], 1))
        bits = xp.pack_signs(x, float(scale), subtract=residual)
        return np.array([scale], "<f4"), bits

    @classmethod
    def accumulate(cls, body: np.ndarray, dense: Array, weight: float) -> None:
        fields = Fields(body, cls.__name__)
        (scale,) = fields.array("<f4", 1)
        bits = fields.array("u1", (dense.shape[0] + 7) // 8)
        fields.end()
        if not 0 <= scale < np.inf:
            raise PayloadError(
                f"OneBit payload has scale {scale}, expected a finite number of at least 0; "
                "it was damaged on the way"
            )
        namespace(dense).add_signs(dense, bits, float(scale) * weight)
