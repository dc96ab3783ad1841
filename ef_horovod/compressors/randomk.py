"""A random subset of k entries, of which only the values are sent."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.compressors.base import Compressor, require_finite
from ef_horovod.compressors.density import kept, require_ratio
from ef_horovod.errors import PayloadError
from ef_horovod.keys import Key
from ef_horovod.registry import register_compressor
from ef_horovod.wire import Fields

_LAYOUT = struct.Struct("<QII")  # seed, k, reserved: values start at a multiple of 8 bytes


@register_compressor(wire_id=4)
@dataclass(frozen=True)
class RandomK(Compressor):
    """Keep k = max(1, floor(ratio * d)) entries drawn uniformly without replacement.

    Receivers draw the same subset from the payload's 64-bit seed, so no index is sent. With
    `shared`, all ranks draw the same subset: values can be summed in flight and the cost does not
    grow with the number of workers.

    Args:
        ratio: kept fraction in (0, 1]; smaller is more aggressive.
        shared: one subset for all ranks (linear, for allreduce), or one for each.
        scale: "contractive" sends the entries as they are (delta = k / d, for error feedback);
            "unbiased" multiplies them by d / k (omega = d / k - 1).

    Raises:
        ValueError: ratio or scale out of range.

    Wire format:
        uint64 seed, uint32 k, uint32 zero, then k float32 values in the order of the draw.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> payload = ef.RandomK(0.5).compress(numpy.ones(4), key=ef.Key(step=1))
        >>> int(payload.decompress().sum())
        2

    References:
        Stich, Cordonnier, Jaggi: Sparsified SGD with Memory (NeurIPS 2018), Definition 2.1.
    """

    ratio: float
    shared: bool = True
    scale: Literal["contractive", "unbiased"] = "contractive"

    def __post_init__(self) -> None:
        require_ratio("RandomK", self.ratio)
        if self.scale not in ("contractive", "unbiased"):
            raise ValueError(
                f"RandomK got scale={self.scale!r}, expected 'contractive' (for error feedback) or "
                "'unbiased'; choose one of them"
            )

    @property
    def linear(self) -> bool:
        return self.shared

    @property
    def unbiased(self) -> bool:
        return self.scale == "unbiased"

    def contraction(self, d: int) -> float | None:
        return kept(self.ratio, None, d) / max(d, 1) if self.scale == "contractive" else None

    def variance(self, d: int) -> float | None:
        return d / max(kept(self.ratio, None, d), 1) - 1 if self.unbiased else None

    @classmethod
    def examples(cls) -> tuple[RandomK, ...]:
        return cls(0.1), cls(0.3, shared=False), cls(0.3, scale="unbiased")

    def body_nbytes(self, d: int) -> int:
        return _LAYOUT.size + 4 * kept(self.ratio, None, d)

    def encode(self, x: Array, key: Key, *, residual: bool) -> tuple[np.ndarray, ...]:
        xp, d = namespace(x), x.shape[0]
        require_finite(xp.abs_max(x), self)
        k = kept(self.ratio, None, d)
        seed = key.draw(shared=self.shared)
        indices = _draw_indices(seed, k, d)
        values = xp.take(x, indices)
        with np.errstate(over="ignore"):  # refused below
            sent = values * np.float32(d / k) if self.unbiased and k else values
        require_finite(sent, self)
        if residual:
            xp.scatter_put(x, indices, values - sent)
        return np.frombuffer(_LAYOUT.pack(seed, k, 0), np.uint8), sent.astype("<f4", copy=False)

    @classmethod
    def accumulate(cls, body: np.ndarray, dense: Array, weight: float) -> None:
        fields = Fields(body, cls.__name__)
        seed, k, reserved = fields.unpack(_LAYOUT)
        values = fields.array("<f4", k)
        fields.end()
        if k > dense.shape[0] or reserved:
            raise PayloadError(
                f"RandomK payload has {k} values and a reserved word of {reserved}, expected at "
                f"most {dense.shape[0]} and 0; it was damaged on the way"
            )
        namespace(dense).scatter_add(dense, _draw_indices(seed, k, dense.shape[0]), values, weight)

    @classmethod
    def summands(cls, body: np.ndarray) -> np.ndarray:
        return body[_LAYOUT.size :].view("<f4")


def _draw_indices(seed: int, k: int, d: int) -> np.ndarray:
    from ef_horovod.arrays import kernels

    indices = np.empty(k, np.int64)
    if k:
        kernels.random_indices(np.uint64(seed), d, indices)
    return indices
