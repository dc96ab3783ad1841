"""One bit per entry, the sign; and one or two scales per vector or block."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ef_horovod.arrays import Array, means, namespace
from ef_horovod.arrays.grid import blocks
from ef_horovod.arrays.keys import Key
from ef_horovod.common.options import keep_block, keep_choice
from ef_horovod.compressors.base import Compressor, require_finite
from ef_horovod.compressors.registry import register_compressor
from ef_horovod.compressors.rounding import block_length, read_block, read_scales
from ef_horovod.errors import PayloadError
from ef_horovod.wire import Fields

_SCALES = ("l1", "l2", "two_means")
_LAYOUT = struct.Struct("<II")  # block (0: the whole vector), scales of a block (1 or 2)


@register_compressor(wire_id=5)
@dataclass(frozen=True)
class OneBit(Compressor):
    """C(x) = scale * sign(x), with sign(0) = +1: about 1/32 of float32.

    With "l1" the scale is the mean magnitude ||x||_1 / d, the least-squares optimum for given
    signs. It makes C a contraction for every x != 0: ||C(x) - x||^2 = ||x||^2 - ||x||_1^2 / d.
    Use it with error feedback.

    With "l2" the largest magnitude m shrinks: max |x - C(x)| <= sqrt(1 - 1 / b) m in blocks of b
    entries. So the error memory also stays bounded. Reason: no entry loses more than m - s or
    s - a, where the scale s is at least m / sqrt(b), a is the smallest magnitude, and s^2 is at
    most m^2 - (m^2 - a^2) / b.

    Args:
        scale: "l1"; "l2" for ||x|| / sqrt(d), which keeps the norm but is not a contraction:
            ||C(x) - x||^2 = 2 (||x|| - ||x||_1 / sqrt(d)) ||x|| comes close to 2 ||x||^2 (error
            feedback still accepts it, see above); or
            "two_means" for the mean of the entries >= 0 and that of all others, which keeps the
            sum and loses no more than "l1".
        block: entries that share a scale, or None for the whole vector.

    Raises:
        ValueError: another scale, or block out of range.

    Wire format:
        float32 scale, then ceil(d / 8) bytes: bit j of byte i is set if x[8i + j] >= 0. With blocks
        or two means, an instance is a `OneBitBlocks` with a format of its own.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> ef.OneBit().compress(numpy.array([1.0, -2.0, 3.0, -4.0])).decompress()
        array([ 2.5, -2.5,  2.5, -2.5])
        >>> ef.OneBit("two_means").compress(numpy.array([1.0, -2.0, 3.0, -4.0])).decompress()
        array([ 2., -3.,  2., -3.])

    References:
        Karimireddy, Rebjock, Stich, Jaggi: Error Feedback Fixes SignSGD (ICML 2019), Algorithm 1
        and Lemma 8. Seide et al.: 1-Bit Stochastic Gradient Descent (Interspeech 2014): two means.
        Tang et al.: DoubleSqueeze (ICML 2019): l2.
    """

    scale: Literal["l1", "l2", "two_means"] = "l1"
    block: int | None = None

    def __new__(cls, scale: str = "l1", block: int | None = None) -> Any:
        general = cls is OneBit and (scale == "two_means" or block is not None)
        return object.__new__(OneBitBlocks if general else cls)

    def __post_init__(self) -> None:
        keep_block(self, "block")
        keep_choice(self, "scale", _SCALES, "'l1' is the one for error feedback")

    def contraction(self, d: int) -> float | None:
        # The worst case has one nonzero entry; two means never lose more than l1.
        return None if self.scale == "l2" else 1.0 / block_length(self.block, d)

    @property
    def supports_error_feedback(self) -> bool:
        return True

    @classmethod
    def examples(cls) -> tuple[OneBit, ...]:
        return cls(), cls("l2")

    def body_nbytes(self, d: int) -> int:
        return 4 + (d + 7) // 8

    def encode(self, x: Array, key: Key, *, residual: bool) -> tuple[np.ndarray, ...]:
        xp, d = namespace(x), x.shape[0]
        if self.scale == "l1":
            exact = xp.abs_sum(x) / max(d, 1)
        else:
            exact = float(np.sqrt(xp.block_squares(x, max(d, 1)).sum() / max(d, 1)))
        require_finite(exact, self)
        scale = np.float32(exact)
        bits = xp.pack_signs(x, float(scale), subtract=residual)
        return np.array([scale], "<f4"), bits

    @classmethod
    def least_nbytes(cls, d: int) -> int:
        return 4 + (d + 7) // 8  # a scale and signs

    @classmethod
    def accumulate(cls, body: np.ndarray, dense: Array, weight: float) -> None:
        scale, bits = cls._read(body, dense.shape[0])
        namespace(dense).add_signs(dense, bits, scale * weight)

    @classmethod
    def mean(
        cls, bodies: Sequence[np.ndarray], workers: int, plus: np.ndarray | None, out: np.ndarray
    ) -> bool:
        scales, bits = zip(*(cls._read(body, out.size) for body in bodies), strict=True)
        means.mean_of_signs(bits, scales, workers, plus, out)
        return True

    @classmethod
    def _read(cls, body: np.ndarray, d: int) -> tuple[float, np.ndarray]:
        fields = Fields(body, cls.__name__)
        (scale,) = fields.array("<f4", 1)
        bits = fields.array("u1", (d + 7) // 8)
        fields.end()
        if not 0 <= scale < np.inf:
            raise PayloadError(
                f"OneBit payload has scale {scale}, expected a finite number of at least 0; "
                "it was damaged on the way"
            )
        return float(scale), bits


@register_compressor(wire_id=12)
@dataclass(frozen=True, repr=False)
class OneBitBlocks(OneBit):
    """What `OneBit` makes of itself when it is asked for blocks or two means.

    Wire format:
        uint32 block (0: the whole vector), uint32 scales of a block (1 or 2), then the magnitude
        of what is >= 0 for each block as float32, with two scales that of all else as well, then
        ceil(d / 8) bytes: bit j of byte i is set if x[8i + j] >= 0.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> ef.OneBit(block=2).compress(numpy.array([1.0, -2.0, 3.0, -4.0])).decompress()
        array([ 1.5, -1.5,  3.5, -3.5])
    """

    shown_as = "OneBit"

    @property
    def _sides(self) -> int:
        return 2 if self.scale == "two_means" else 1

    @classmethod
    def examples(cls) -> tuple[OneBit, ...]:
        return OneBit("l1", block=64), OneBit("two_means")

    def body_nbytes(self, d: int) -> int:
        count = blocks(d, block_length(self.block, d))
        return _LAYOUT.size + 4 * self._sides * count + (d + 7) // 8

    def encode(self, x: Array, key: Key, *, residual: bool) -> tuple[np.ndarray, ...]:
        xp, block = namespace(x), block_length(self.block, x.shape[0])
        scales = self._magnitudes(x, block).astype("<f4")
        require_finite(scales, self)
        bits = xp.pack_signs(x, 0.0, subtract=False)
        if residual:
            xp.add_sides(x, bits, scales[0], -scales[-1], block, -1.0)
        head = np.frombuffer(_LAYOUT.pack(self.block or 0, self._sides), np.uint8)
        return head, scales.reshape(-1), bits

    def _magnitudes(self, x: Array, block: int) -> np.ndarray:
        """float64[sides, blocks]: magnitudes for the entries >= 0, and for all others."""
        xp, d = namespace(x), x.shape[0]
        lengths = np.minimum(block, d - block * np.arange(blocks(d, block)))
        if self.scale == "l2":
            return np.sqrt(xp.block_squares(x, block) / lengths)[None]
        high, low, count = xp.block_halves(x, block)
        if self.scale == "l1":
            return ((high - low) / lengths)[None]
        return np.stack([high / np.maximum(count, 1), -low / np.maximum(lengths - count, 1)])

    @classmethod
    def least_nbytes(cls, d: int) -> int:
        return _LAYOUT.size + (d + 7) // 8  # with the signs alone

    @classmethod
    def accumulate(cls, body: np.ndarray, dense: Array, weight: float) -> None:
        fields, d = Fields(body, cls.__name__), dense.shape[0]
        word, sides = fields.unpack(_LAYOUT)
        if sides not in (1, 2):
            raise PayloadError(
                f"OneBitBlocks payload has {sides} scales for a block, expected 1 or 2; "
                "it was damaged on the way"
            )
        block = read_block(word, cls.__name__, d)
        scales = read_scales(fields, cls.__name__, sides * blocks(d, block)).reshape(sides, -1)
        bits = fields.array("u1", (d + 7) // 8)
        fields.end()
        namespace(dense).add_sides(dense, bits, scales[0], -scales[-1], block, weight)
