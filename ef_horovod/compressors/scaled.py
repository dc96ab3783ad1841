"""An unbiased compressor, scaled down to a contraction."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from ef_horovod.arrays import Array
from ef_horovod.arrays.keys import Key
from ef_horovod.compressors.base import DEFAULT_KEY, Compressor, Payload
from ef_horovod.compressors.registry import compressor_of, register_compressor
from ef_horovod.compressors.sparse import Sparsifier
from ef_horovod.compressors.terngrad import TernGrad
from ef_horovod.compressors.then import Then
from ef_horovod.errors import PayloadError, UnsupportedError
from ef_horovod.wire import Fields

_LAYOUT = struct.Struct("<fBBH")  # scale, kind of the compressor, reserved


@register_compressor(wire_id=16)
@dataclass(frozen=True)
class Scaled(Compressor):
    """C(x) / (1 + omega(d)) of an unbiased C: a contraction with delta = 1 / (1 + omega(d)).

    Error feedback and EF21 need a contraction. An unbiased compressor with omega < 1 is one
    unscaled, with delta = 1 - omega. Scaled, its delta is larger for every omega, and it is also a
    contraction for omega >= 1. So coarse quantizers such as `QSGD(4)` and `TernGrad()` work with
    error feedback. Leave unbiased compressors unscaled for `NoFeedback`.

    A random sparsifier scaled down only loses its gain. Use `RandomK(scale="contractive")` and the
    like instead, which send the same entries without a multiplication.

    E||s C(x) - x||^2 = s^2 E||C(x) - x||^2 + (1 - s)^2 ||x||^2 is smallest at s = 1 / (1 + omega),
    where it is at most omega / (1 + omega) ||x||^2. Receivers multiply by s as they add, quantizers
    as they subtract C(x) from x, so scaling costs no pass over memory.

    Args:
        compressor: an unbiased one, not a sparsifier.

    Raises:
        UnsupportedError: it is biased, not a compressor, or a sparsifier.

    Wire format:
        float32 scale, uint8 kind of the compressor, uint8 0, uint16 0, then its body.

    Example:
        >>> import ef_horovod as ef
        >>> ef.Scaled(ef.Natural()).contraction(100)  # without a scale: 7 / 8
        0.8888888888888888

    References:
        Fatkhullin et al.: EF21 with Bells & Whistles (2021), Section 1: U(omega) scaled by
        1 / (1 + omega) is in B(1 / (1 + omega)).
    """

    compressor: Compressor

    def __post_init__(self) -> None:
        known = isinstance(self.compressor, Compressor)
        if isinstance(self.compressor, (Sparsifier, Then)):
            raise UnsupportedError(
                f"Scaled got {self.compressor!r}, expected an unbiased compressor that is no "
                "sparsifier; take scale='contractive' there, and for coded values write "
                "Then(RandomK(0.01), Scaled(QSGD(7)))"
            )
        if not known or not self.compressor.unbiased or not self._readable(type(self.compressor)):
            raise UnsupportedError(
                f"Scaled got {self.compressor!r}, expected an unbiased compressor, because a "
                "biased one has no omega to scale by; a contraction needs no scale"
            )

    @property
    def fixed_size(self) -> bool:
        return self.compressor.fixed_size

    @property
    def allreducible(self) -> bool:
        return self.compressor.allreducible

    def scale(self, d: int) -> float:
        """1 / (1 + omega(d))."""
        omega = self.compressor.variance(d)
        assert omega is not None, "unbiased compressors state their variance"
        return 1 / (1 + omega)

    def contraction(self, d: int) -> float:
        return self.scale(d)

    @classmethod
    def examples(cls) -> tuple[Scaled, ...]:
        return (cls(TernGrad(bucket=512)),)

    def body_nbytes(self, d: int) -> int:
        return _LAYOUT.size + self.compressor.body_nbytes(d)

    def encode(self, x: Array, key: Key, *, residual: bool) -> tuple[np.ndarray, ...]:
        scale = float(np.float32(self.scale(x.shape[0])))
        fused = residual and self.compressor.weighs_residual
        # `weighs_residual` allows a share in place of True.
        parts = self.compressor.encode(x, key, residual=scale if fused else False)  # type: ignore[arg-type]
        if residual and not fused:
            body = np.concatenate([part.view(np.uint8) for part in parts])
            self.compressor.accumulate(body, x, -scale)
        return np.frombuffer(_LAYOUT.pack(scale, self.compressor.wire_id, 0, 0), np.uint8), *parts

    @classmethod
    def require_body(cls, body: np.ndarray, d: int) -> None:
        kind, _, coded = cls._read(body)
        kind.require_body(coded, d)

    @classmethod
    def accumulate(cls, body: np.ndarray, dense: Array, weight: float) -> None:
        kind, scale, coded = cls._read(body)
        kind.accumulate(coded, dense, weight * scale)

    @classmethod
    def _read(cls, body: np.ndarray) -> tuple[type[Compressor], float, np.ndarray]:
        """The compressor's class, the scale, and its body."""
        fields = Fields(body, cls.__name__)
        scale, number, *reserved = fields.unpack(_LAYOUT)
        kind = compressor_of(number)
        if not 0 < scale <= 1 or kind is None or not cls._readable(kind) or any(reserved):
            raise PayloadError(
                f"Scaled payload has scale {scale}, kind {number} and reserved words of "
                f"{reserved}, expected a scale in (0, 1], an unbiased compressor and zeros; import "
                "the module that defines it on all ranks, or look for damage on the way"
            )
        return kind, scale, fields.rest()

    @classmethod
    def summands(cls, body: np.ndarray) -> np.ndarray:
        kind = compressor_of(int(body[4]))
        assert kind is not None, "a payload that was made here names a registered kind"
        return kind.summands(body[_LAYOUT.size :])

    def skip(self, x: Array, key: Key = DEFAULT_KEY) -> Payload:
        return self.skip_like_zeros(x, key) if self.allreducible else super().skip(x, key)

    @staticmethod
    def _readable(kind: type[Compressor]) -> bool:
        """Whether bodies of this kind may be nested, so that reading does not recurse."""
        return not issubclass(kind, (Sparsifier, Then, Scaled))
