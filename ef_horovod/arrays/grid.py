"""Grids of quantization levels, and how their codes are packed into bytes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_LARGEST = float(np.finfo(np.float32).max)


class Grid(NamedTuple):
    """A grid of 2 * levels + 1 numbers, symmetric about 0, in units of a block's scale.

    A code is a level from 0 to `levels` with the sign bit above it, in the fewest bits that hold
    both. Codes are packed without gaps, lowest bit first. Ternary codes are base-3 digits
    (0, +1, -1), five in a byte, lowest digit first.

    Args:
        kind: "uniform" (0, 1, ..., levels), "powers" (0, 1, 2, 4, ..., 2**(levels - 1)) or
            "ternary" (0, 1; levels is 1).
        levels: number of levels above 0.
    """

    kind: str
    levels: int

    @property
    def width(self) -> int:
        """Bits of a code with its sign."""
        return 1 + self.levels.bit_length()

    def nbytes(self, n: int) -> int:
        """Bytes that n codes take."""
        return (n + 4) // 5 if self.kind == "ternary" else (n * self.width + 7) // 8

    def limits(self, scales: np.ndarray) -> np.ndarray:
        """float32[blocks]: the largest number of the grid that stays finite when scaled."""
        top = float(self.levels if self.kind != "powers" else 2.0 ** (self.levels - 1))
        fitting = np.floor(_LARGEST / np.maximum(scales.astype(np.float64), 1e-45))
        if self.kind == "powers":
            fitting = 2.0 ** np.floor(np.log2(fitting))
        return np.where(scales > 0, np.minimum(top, fitting), 0.0).astype(np.float32)


def blocks(n: int, block: int) -> int:
    """Number of blocks of `block` entries in n entries; the last block may be shorter."""
    return -(-n // block)


def bits_nbytes(n: int, width: int) -> int:
    """Bytes of n codes of `width` bits."""
    return (n * width + 7) // 8
