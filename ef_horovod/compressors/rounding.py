"""Shared code of the quantizers: blocks with scales, their bytes, contraction from omega."""

from __future__ import annotations

import struct
from typing import ClassVar

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.grid import Grid, bits_nbytes, blocks
from ef_horovod.arrays.keys import Key
from ef_horovod.arrays.numpy_quantize import largest_code
from ef_horovod.common.options import LARGEST_FIELD, keep_block
from ef_horovod.common.schedules import keep_scheduled_whole
from ef_horovod.compressors.base import Compressor, require_finite
from ef_horovod.errors import PayloadError
from ef_horovod.wire import Fields

_LEVELS = struct.Struct("<II")  # levels, bucket (0: the whole vector)


def block_length(option: int | None, d: int) -> int:
    """Number of entries of the longest block of a vector of d: at least 1."""
    return max(1, d if option is None else min(option, d))


def contraction_of(omega: float) -> float | None:
    """delta of an unbiased compressor with variance omega, or None if it is no contraction."""
    return 1.0 - omega if omega < 1 else None


def scale_of(exact: np.ndarray, compressor: Compressor) -> np.ndarray:
    """Scales as float32, rounded up so that no scaled entry exceeds the grid.

    Args:
        exact: float64[blocks].
        compressor: for the error message.

    Raises:
        NonFiniteError: a scale is not finite, as after a NaN or an infinity in its block.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        scales = exact.astype(np.float32)
        scales = np.where(scales < exact, np.nextafter(scales, np.float32(np.inf)), scales)
    require_finite(scales, compressor)
    return scales.astype("<f4", copy=False)


def read_block(word: int, what: str, d: int) -> int:
    """The block length from its field in the payload; 0 there means the whole vector."""
    if word > LARGEST_FIELD:
        raise PayloadError(
            f"{what} payload has blocks of {word} entries, expected at most {LARGEST_FIELD}; "
            "it was damaged on the way"
        )
    return block_length(word or None, d)


def read_scales(fields: Fields, what: str, count: int) -> np.ndarray:
    """`count` scales, checked to be finite and at least 0."""
    scales = fields.array("<f4", count)
    if not np.all((scales >= 0) & (scales < np.inf)):
        raise PayloadError(
            f"{what} payload has a scale that is below 0 or not finite, expected finite numbers "
            "of at least 0; it was damaged on the way"
        )
    return scales


class RoundsToLevels(Compressor):
    """Base of compressors that round at random to levels of a block's norm.

    A subclass has the fields `levels` and `bucket`. It defines the grid of levels (`grid`), their
    maximum number (`max_levels`), and the lowest level above 0 of each block (`lowest`).

    Wire format:
        uint32 levels, uint32 bucket (0: the whole vector), a float32 for each block, then codes.
    """

    grid: ClassVar[str]  # a kind of `Grid`
    max_levels: ClassVar[int]
    levels: int
    bucket: int | None
    weighs_residual = True

    def __post_init__(self) -> None:
        way_out = "powers of two less 1 use all codes"
        keep_scheduled_whole(self, "levels", 1, self.max_levels, way_out)
        keep_block(self, "bucket")

    def lowest(self, x: Array, block: int) -> np.ndarray:
        """The lowest level above 0 of each block of float32[d] x: float64[blocks]."""
        raise NotImplementedError

    @property
    def unbiased(self) -> bool:
        return True

    def contraction(self, d: int) -> float | None:
        omega = self.variance(d)
        assert omega is not None
        return contraction_of(omega)

    def body_nbytes(self, d: int) -> int:
        scales = 4 * blocks(d, block_length(self.bucket, d))
        return _LEVELS.size + scales + Grid(self.grid, self.levels).nbytes(d)

    def encode(self, x: Array, key: Key, *, residual: float) -> tuple[np.ndarray, ...]:
        block, grid = block_length(self.bucket, x.shape[0]), Grid(self.grid, self.levels)
        scales = scale_of(self.lowest(x, block), self)
        seed = key.draw(shared=False)
        codes = namespace(x).quantize(x, scales, block, grid, seed, subtract=residual)
        head = np.frombuffer(_LEVELS.pack(self.levels, self.bucket or 0), np.uint8)
        return head, scales, codes

    @classmethod
    def least_nbytes(cls, d: int) -> int:
        return _LEVELS.size + bits_nbytes(d, 2)  # a sign and one level

    @classmethod
    def accumulate(cls, body: np.ndarray, dense: Array, weight: float) -> None:
        fields = Fields(body, cls.__name__)
        levels, bucket = fields.unpack(_LEVELS)
        if not 1 <= levels <= cls.max_levels:
            raise PayloadError(
                f"{cls.__name__} payload has {levels} levels, expected 1 to {cls.max_levels}; "
                "it was damaged on the way"
            )
        block = read_block(bucket, cls.__name__, dense.shape[0])
        add_rounded(fields, cls.__name__, Grid(cls.grid, levels), block, dense, weight)


def add_rounded(
    fields: Fields, what: str, grid: Grid, block: int, dense: Array, weight: float
) -> None:
    """dense += weight * (scales times codes on a grid), after checking all of them."""
    d = dense.shape[0]
    scales = read_scales(fields, what, blocks(d, block))
    codes = fields.array("u1", grid.nbytes(d))
    fields.end()
    if _highest(codes, grid, d) > (242 if grid.kind == "ternary" else grid.levels):
        raise PayloadError(
            f"{what} payload has a code that stands for no number, expected levels up to "
            f"{grid.levels}; it was damaged on the way"
        )
    namespace(dense).add_quantized(dense, codes, scales, block, grid, weight)


def _highest(codes: np.ndarray, grid: Grid, d: int) -> int:
    if grid.kind == "ternary":
        return int(codes.max(initial=0))
    mask = (1 << (grid.width - 1)) - 1
    return largest_code(codes, grid.width, d, mask) if grid.levels < mask else 0
