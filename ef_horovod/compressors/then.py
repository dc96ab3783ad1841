"""A sparsifier whose values are coded by another compressor."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ef_horovod.arrays import Array
from ef_horovod.arrays.keys import Key
from ef_horovod.compressors.base import DEFAULT_KEY, Compressor, Payload
from ef_horovod.compressors.hardthreshold import HardThreshold
from ef_horovod.compressors.natural import Natural
from ef_horovod.compressors.qsgd import QSGD
from ef_horovod.compressors.registry import compressor_of, register_compressor
from ef_horovod.compressors.sparse import HEAD_NBYTES, Places, Sparsifier
from ef_horovod.compressors.topk import TopK
from ef_horovod.errors import PayloadError, UnsupportedError
from ef_horovod.wire import Fields

_LAYOUT = struct.Struct("<BBH")  # kinds of sparsifier and values, reserved
_PURPOSE = 5  # of the values' draws: independent of the sparsifier's


@register_compressor(wire_id=15)
@dataclass(frozen=True)
class Then(Compressor):
    """C(x) = V(S(x)): the entries that a sparsifier S keeps, their values coded by V.

    At 1 % density, `Then(TopK(0.01), Natural())` sends 17.6 bits per kept entry, `TopK` alone 40.6.
    So it can keep twice as many entries for fewer bytes. Constants of C for a vector of d entries,
    of which S keeps k:

    - If S keeps entries unchanged and V is a contraction, so is C, with delta = delta_S(d)
      delta_V(k). S and V lose different entries, so ||x - C(x)||^2 =
      ||x - Sx||^2 + ||Sx - V(Sx)||^2 <= ||x||^2 - delta_V ||Sx||^2, and ||Sx||^2 >= delta_S
      ||x||^2. An unbiased V with omega_V(k) < 1 has delta_V = 1 - omega_V; `Scaled(V)` has
      1 / (1 + omega_V) for any omega_V.
    - If both are unbiased, so is C, with omega = (1 + omega_S(d)) (1 + omega_V(k)) - 1.
    - For `HardThreshold`, k depends on the data and there is no delta. The error memory still stays
      bounded if V suits error feedback.

    If k varies, the constants of V are those for k = d.

    Args:
        sparsifier: `TopK`, `HardThreshold`, `RandomK`, `RandomBlock`, `RandomSparsify`, or any
            other `Sparsifier`.
        values: the compressor of the kept values: `Natural`, `Cast`, `QSGD`,
            `NaturalDithering`, ... but no sparsifier. Its blocks are blocks of kept values.

    Raises:
        UnsupportedError: one of them is something else.

    Wire format:
        uint8 kind of the sparsifier, uint8 kind of the values' compressor, uint16 0, then the
        sparsifier's body as far as it says which places, then the other one's body.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> both = ef.Then(ef.TopK(ratio=0.5), ef.Natural())
        >>> both.compress(numpy.array([4.0, -1.0, 2.0, -8.0])).decompress()
        array([ 4.,  0.,  0., -8.])

    References:
        Basu, Data, Karakus, Diggavi: Qsparse-local-SGD (NeurIPS 2019), Lemma 1, for quantized
        sparsification under error feedback. The constants here were derived anew, as above.
    """

    sparsifier: Sparsifier
    values: Compressor
    sends_entries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.sparsifier, Sparsifier):
            raise UnsupportedError(
                f"Then got {self.sparsifier!r} first, expected a sparsifier, which says what is "
                "kept; write for example Then(TopK(0.01), Natural())"
            )
        if not isinstance(self.values, Compressor) or isinstance(self.values, (Sparsifier, Then)):
            raise UnsupportedError(
                f"Then got {self.values!r} for the kept values, expected a compressor that keeps "
                "all of them; to keep fewer, give the sparsifier a smaller ratio"
            )

    @property
    def fixed_size(self) -> bool:
        return self.sparsifier.fixed_size and self.values.fixed_size

    @property
    def allreducible(self) -> bool:
        return self.sparsifier.allreducible and self.values.allreducible

    @property
    def shared(self) -> bool | None:
        """Whether all draws are equal on all ranks; None if the two parts may differ in this."""
        return True if self.allreducible else None

    @property
    def unbiased(self) -> bool:
        return self.sparsifier.unbiased and self.values.unbiased

    @property
    def supports_error_feedback(self) -> bool:
        if self.sparsifier.contracts:
            return self.contracts
        return self.sparsifier.supports_error_feedback and self.values.supports_error_feedback

    def contraction(self, d: int) -> float | None:
        outer, inner = self.sparsifier.contraction(d), self.values.contraction(self._most(d))
        return None if outer is None or inner is None else outer * inner

    def variance(self, d: int) -> float | None:
        outer, inner = self.sparsifier.variance(d), self.values.variance(self._most(d))
        return None if outer is None or inner is None else (1 + outer) * (1 + inner) - 1

    def _most(self, d: int) -> int:
        """The largest k."""
        return self.sparsifier.count(d) if self.sparsifier.fixed_size else d

    @classmethod
    def examples(cls) -> tuple[Then, ...]:
        return cls(TopK(ratio=0.2), Natural()), cls(HardThreshold(0.5), QSGD(levels=127))

    def body_nbytes(self, d: int) -> int:
        places = self.sparsifier.places_nbytes(d)
        return _LAYOUT.size + places + self.values.body_nbytes(self.sparsifier.count(d))

    def encode(self, x: Array, key: Key, *, residual: bool) -> tuple[np.ndarray, ...]:
        d, own_key = x.shape[0], key.apart(_PURPOSE)
        places_parts, places, values = self.sparsifier.choose(x, key)
        values = np.require(values, requirements="W")  # TensorFlow's arrays are read-only
        sent = self.sparsifier.amplified(values, d)
        fused = residual and sent is values
        parts = self.values.encode(sent, own_key, residual=fused)
        if residual:
            if not fused:
                body = np.concatenate([part.view(np.uint8) for part in parts])
                self.values.accumulate(body, values, -1.0)
            places.put(x, values)
        kinds = _LAYOUT.pack(self.sparsifier.wire_id, self.values.wire_id, 0)
        return np.frombuffer(kinds, np.uint8), *places_parts, *parts

    @classmethod
    def require_body(cls, body: np.ndarray, d: int) -> None:
        cls._read(body, d)

    @classmethod
    def accumulate(cls, body: np.ndarray, dense: Array, weight: float) -> None:
        places, values = cls._read(body, dense.shape[0])
        places.add(dense, values, weight)

    @classmethod
    def clear(cls, body: np.ndarray, x: Array) -> None:
        places, values = cls._read(body, x.shape[0])
        places.put(x, np.zeros_like(values))

    @classmethod
    def _read(cls, body: np.ndarray, d: int) -> tuple[Places, np.ndarray]:
        kinds = Fields(body, cls.__name__)
        first, second, reserved = kinds.unpack(_LAYOUT)
        sparsifier, kind = compressor_of(first), compressor_of(second)
        good = sparsifier is not None and issubclass(sparsifier, Sparsifier)
        if not good or kind is None or issubclass(kind, (Sparsifier, Then)) or reserved:
            raise PayloadError(
                f"Then payload is of kinds {first} and {second} with a reserved word of "
                f"{reserved}, expected a sparsifier, a compressor of its values and 0; import the "
                "modules that define them on all ranks, or look for damage on the way"
            )
        fields = Fields(kinds.rest(), cls.__name__, kind.require_body)
        places = sparsifier.read(fields, d)  # type: ignore[union-attr]
        coded = fields.rest()
        kind.require_body(coded, places.size)
        values = np.zeros(places.size, np.float32)
        kind.accumulate(coded, values, 1.0)
        return places, values

    @classmethod
    def summands(cls, body: np.ndarray) -> np.ndarray:
        kind = compressor_of(int(body[1]))
        assert kind is not None, "a payload that was made here names registered kinds"
        return kind.summands(body[_LAYOUT.size + HEAD_NBYTES :])

    def skip(self, x: Array, key: Key = DEFAULT_KEY) -> Payload:
        return self.skip_like_zeros(x, key) if self.allreducible else super().skip(x, key)
