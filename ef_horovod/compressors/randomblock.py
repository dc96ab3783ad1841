"""Random runs of neighbouring entries; only their values are sent."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.arrays.numpy_quantize import random_words
from ef_horovod.common.options import keep_block
from ef_horovod.compressors.base import require_finite
from ef_horovod.compressors.density import keep_ratio, kept
from ef_horovod.compressors.registry import register_compressor
from ef_horovod.compressors.sparse import Chosen, RandomSparsifier, Scale
from ef_horovod.errors import PayloadError
from ef_horovod.wire import Fields

_LAYOUT = struct.Struct("<QII")  # seed, k, block: values start at a multiple of 8 bytes


class Runs(NamedTuple):
    """Runs of neighbouring entries: (start, stop) of each."""

    slices: list[tuple[int, int]]
    size: int

    def put(self, x: Array, values: np.ndarray) -> None:
        namespace(x).put_slices(x, self.slices, values)

    def add(self, x: Array, values: np.ndarray, weight: float) -> None:
        namespace(x).add_slices(x, self.slices, values, weight)


@register_compressor(wire_id=11)
@dataclass(frozen=True)
class RandomBlock(RandomSparsifier):
    """Keep k = max(1, floor(ratio * d)) entries in runs of neighbours at random places.

    As `RandomK`, but memory is read in runs and no index is drawn per entry. Each entry is kept
    with the same probability k / d, so the constants are those of `RandomK`. Neighbours are kept
    or dropped together.

    Args:
        ratio: kept fraction in (0, 1]; smaller is more aggressive.
        block: entries of a run; the last run has the rest of k.
        scale: "contractive" sends the entries as they are (delta = k / d, for error feedback);
            "unbiased" multiplies them by d / k (omega = d / k - 1).
        shared: the same places on all ranks (linear, for allreduce), or different ones.

    Raises:
        ValueError: ratio, block or scale out of range.

    Wire format:
        uint64 seed, uint32 k, uint32 block, then k float32 values: those of the runs, in the order
        that `_runs` gives (docs/wire-format.md).

    Example:
        >>> import ef_horovod as ef, numpy
        >>> payload = ef.RandomBlock(0.5).compress(numpy.ones(4), key=ef.Key(step=1))
        >>> int(payload.decompress().sum())
        2

    References:
        Stich, Cordonnier, Jaggi: Sparsified SGD with Memory (NeurIPS 2018), Definition 2.1, for
        single entries.
    """

    ratio: float | Any
    block: int = 4096
    scale: Scale = "contractive"
    shared: bool = True

    def __post_init__(self) -> None:
        keep_ratio(self)
        keep_block(self, "block", optional=False)
        super().__post_init__()

    @classmethod
    def examples(cls) -> tuple[RandomBlock, ...]:
        return cls(0.1), cls(0.3, block=5, scale="unbiased", shared=False)

    def count(self, d: int) -> int:
        return kept(self.ratio, None, d)

    def choose(self, x: Array, key: Key) -> Chosen:
        xp, d = namespace(x), x.shape[0]
        require_finite(xp.abs_max(x), self)
        seed, k = key.draw(shared=self.shared), self.count(d)
        runs = _runs(seed, k, self.block, d)
        head = np.frombuffer(_LAYOUT.pack(seed, k, self.block), np.uint8)
        return Chosen((head,), Runs(runs, k), xp.take_slices(x, runs))

    @classmethod
    def read(cls, fields: Fields, d: int) -> Runs:
        seed, k, block = fields.unpack(_LAYOUT)
        if k > d or not 0 < block < 2**31:
            raise PayloadError(
                f"RandomBlock payload has {k} values in runs of {block}, expected at most {d} in "
                f"runs of 1 to {2**31 - 1}; it was damaged on the way"
            )
        fields.require_values(k)
        return Runs(_runs(seed, k, block, d), k)


def _runs(seed: int, k: int, block: int, d: int) -> list[tuple[int, int]]:
    """(start, stop) of the runs, in the order in which their values are sent.

    On a circle of d entries, runs of `block` alternate with random gaps, d - k entries in total.
    The circle is rotated by a random offset, so each entry is in a run with probability k / d. A
    run across the end of the vector is cut in two.
    """
    if k == 0:
        return []
    count = -(-k // block)
    words = random_words(seed, count + 1)
    skipped = np.sort((words[1:] % np.uint64(d - k + 1)).astype(np.int64))
    before = block * np.arange(count)  # entries kept by the runs before
    starts = (skipped + before + int(words[0] % np.uint64(d))) % d
    lengths = np.minimum(block, k - before)
    runs = []
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        runs.append((start, min(start + length, d)))
        if start + length > d:
            runs.append((0, start + length - d))
    return runs
