"""Each entry is kept independently with one probability; only the kept values are sent."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.common.schedules import keep_scheduled_number
from ef_horovod.compressors.base import require_finite
from ef_horovod.compressors.registry import register_compressor
from ef_horovod.compressors.sparse import (
    Chosen,
    Entries,
    RandomSparsifier,
    Scale,
)
from ef_horovod.errors import PayloadError
from ef_horovod.wire import Fields

_LAYOUT = struct.Struct("<Qd")  # seed, p
_TAILS = 1024  # gaps that one random word can stand for


@register_compressor(wire_id=14)
@dataclass(frozen=True)
class RandomSparsify(RandomSparsifier):
    """Keep each entry with probability p, independently of all others.

    As `RandomK`, but the number of entries varies: p d on average, with a standard deviation of
    sqrt(p (1 - p) d). Receivers draw the same entries from the payload's seed, so no index is sent.
    With `shared`, all ranks draw the same entries, and values can be summed in flight. Gaps between
    kept entries are drawn instead of one coin per entry, so the work grows with p d.

    `RandomK` has a fixed size and the same constants. Use this class for analyses that require
    independent coins.

    Args:
        p: probability to keep an entry, in (0, 1]; smaller is more aggressive.
        shared: the same entries on all ranks (linear, for allreduce), or different ones.
        scale: "contractive" sends the entries as they are (delta = p, for error feedback);
            "unbiased" multiplies them by 1 / p (omega = 1 / p - 1).

    Raises:
        ValueError: p or scale out of range.

    Wire format:
        uint64 seed, float64 p, then the kept float32 values in the order of their places, which
        follow from seed, p and d (docs/wire-format.md). The size varies from step to step, so
        messages are padded to a size class on the way.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> x = ef.RandomSparsify(0.25, scale="unbiased").compress(numpy.ones(10_000)).decompress()
        >>> [float(value) for value in numpy.unique(x)]
        [0.0, 4.0]

    References:
        Tang, Yu, Lian, Zhang, Liu: DoubleSqueeze (ICML 2019), Section 3.2, "random
        sparsification"; Wangni, Wang, Liu, Zhang: Gradient Sparsification (NeurIPS 2018), with
        equal probabilities.
    """

    p: float | Any
    shared: bool = True
    scale: Scale = "contractive"

    def __post_init__(self) -> None:
        way_out = "0.01 keeps one entry in a hundred on average"
        keep_scheduled_number(self, "p", "(0, 1]", way_out, "a probability")
        super().__post_init__()

    @property
    def fixed_size(self) -> bool:
        return False

    def share(self, d: int) -> float:
        return self.p

    @classmethod
    def examples(cls) -> tuple[RandomSparsify, ...]:
        return cls(0.1), cls(0.3, shared=False, scale="unbiased")

    def count(self, d: int) -> int:
        return 0

    def gain(self, d: int) -> float:
        return 1 / self.p if self.unbiased else 1.0

    def choose(self, x: Array, key: Key) -> Chosen:
        xp = namespace(x)
        require_finite(xp.abs_max(x), self)
        seed = key.draw(shared=self.shared)
        indices = _draw_indices(seed, self.p, x.shape[0], x.shape[0])
        assert indices is not None, "no more than all entries are kept"
        head = np.frombuffer(_LAYOUT.pack(seed, self.p), np.uint8)
        return Chosen((head,), Entries(indices), xp.take(x, indices))

    @classmethod
    def read(cls, fields: Fields, d: int) -> Entries:
        seed, p = fields.unpack(_LAYOUT)
        if not 0 < p <= 1:
            raise PayloadError(
                f"RandomSparsify payload has p={p}, expected a probability in (0, 1]; "
                "it was damaged on the way"
            )
        most = fields.most_values(d)
        indices = _draw_indices(seed, p, d, most)
        if indices is None:
            raise PayloadError(
                f"RandomSparsify payload keeps more than {most} of {d} entries, expected values "
                "for all of them; it was cut off or damaged on the way"
            )
        return Entries(indices)


def _draw_indices(seed: int, p: float, d: int, most: int) -> np.ndarray | None:
    """int64[k]: the ascending kept indices below d; None if there are more than `most`."""
    from ef_horovod.arrays import kernels

    tails, guide = _gaps(p)
    # Six standard deviations above the mean: too small once in 10**9 draws.
    room = int(p * d + 6 * math.sqrt(p * (1 - p) * d)) + 16
    while True:
        indices = np.empty(min(room, most), np.int64)
        count = kernels.bernoulli_indices(np.uint64(seed), tails, guide, d, indices)
        if count <= indices.size:
            return indices[:count]
        if indices.size == most:
            return None
        room *= 2


@lru_cache(maxsize=64)
def _gaps(p: float) -> tuple[np.ndarray, np.ndarray]:
    """(tails, guide) of `kernels.bernoulli_indices`, in integers, so that all machines agree."""
    one = 1 << 128
    lost = one - int(Fraction(p) * one)  # 1 - p
    tails, tail = [], one
    for _ in range(_TAILS):
        tail = tail * lost >> 128
        tails.append(min(tail >> 64, (1 << 64) - 1))
    falling = np.array(tails, np.uint64)
    # The largest word with upper bits b is (b + 1) * 2**54 - 1: count the tails above it.
    last = np.array([((b + 1) << 54) - 1 for b in range(_TAILS)], np.uint64)
    guide = _TAILS - np.searchsorted(falling[::-1], last, side="right")
    return falling, guide.astype(np.int64)
