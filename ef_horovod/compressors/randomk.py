"""A random subset of k entries; only their values are sent."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.compressors.base import require_finite
from ef_horovod.compressors.density import keep_ratio, kept
from ef_horovod.compressors.registry import register_compressor
from ef_horovod.compressors.sparse import (
    Chosen,
    Entries,
    RandomSparsifier,
    Scale,
)
from ef_horovod.errors import PayloadError
from ef_horovod.wire import Fields

_LAYOUT = struct.Struct("<QII")  # seed, k, reserved: values start at a multiple of 8 bytes


@register_compressor(wire_id=4)
@dataclass(frozen=True)
class RandomK(RandomSparsifier):
    """Keep k = max(1, floor(ratio * d)) entries drawn uniformly without replacement.

    Receivers draw the same subset from the payload's 64-bit seed, so no index is sent. With
    `shared`, all ranks draw the same subset. Then values can be summed in flight, and the cost does
    not grow with the number of workers.

    Args:
        ratio: kept fraction in (0, 1]; smaller is more aggressive.
        shared: the same subset on all ranks (linear, for allreduce), or different ones.
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

    ratio: float | Any
    shared: bool = True
    scale: Scale = "contractive"

    def __post_init__(self) -> None:
        keep_ratio(self)
        super().__post_init__()

    @classmethod
    def examples(cls) -> tuple[RandomK, ...]:
        return cls(0.1), cls(0.3, shared=False), cls(0.3, scale="unbiased")

    def count(self, d: int) -> int:
        return kept(self.ratio, None, d)

    def choose(self, x: Array, key: Key) -> Chosen:
        xp, d = namespace(x), x.shape[0]
        require_finite(xp.abs_max(x), self)
        seed, k = key.draw(shared=self.shared), self.count(d)
        indices = _draw_indices(seed, k, d)
        head = np.frombuffer(_LAYOUT.pack(seed, k, 0), np.uint8)
        return Chosen((head,), Entries(indices), xp.take(x, indices))

    @classmethod
    def read(cls, fields: Fields, d: int) -> Entries:
        seed, k, reserved = fields.unpack(_LAYOUT)
        if k > d or reserved:
            raise PayloadError(
                f"RandomK payload has {k} values and a reserved word of {reserved}, expected at "
                f"most {d} and 0; it was damaged on the way"
            )
        fields.require_values(k)
        return Entries(_draw_indices(seed, k, d))


def _draw_indices(seed: int, k: int, d: int) -> np.ndarray:
    from ef_horovod.arrays import kernels

    indices = np.empty(k, np.int64)
    if k:
        kernels.random_indices(np.uint64(seed), d, indices)
    return indices
