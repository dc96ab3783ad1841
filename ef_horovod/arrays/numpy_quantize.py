"""Array functions of the quantizers, for NumPy; `arrays/numpy.py` re-exports them.

As there, `x` is a flat, contiguous float32[n]. Blocks are runs of `block` entries; the last one
may be shorter. Scales of blocks are on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np

from ef_horovod.arrays.grid import Grid, bits_nbytes, blocks

__all__ = [
    "add_quantized",
    "add_shortened",
    "add_sides",
    "add_slices",
    "block_halves",
    "block_max",
    "block_squares",
    "put_slices",
    "quantize",
    "shorten",
    "take_slices",
]


_NOTHING = np.empty(0, np.float32)


def block_max(x: np.ndarray, block: int) -> np.ndarray:
    """float32[blocks]: the largest magnitude of each block; not finite if an entry is not."""
    out = np.empty(blocks(x.size, block), np.uint32)
    _kernels().block_max(x.view(np.uint32), block, out)
    return out.view(np.float32)


def block_squares(x: np.ndarray, block: int) -> np.ndarray:
    """float64[blocks]: the sum of squares of each block."""
    out = np.empty(blocks(x.size, block))
    _kernels().block_squares(x, block, out)
    return out


def block_halves(x: np.ndarray, block: int) -> np.ndarray:
    """float64[3, blocks]: sum of the entries >= 0, sum of the others, number of entries >= 0."""
    out = np.empty((3, blocks(x.size, block)))
    _kernels().block_halves(x, block, out)
    return out


def quantize(
    x: np.ndarray, scales: np.ndarray, block: int, grid: Grid, seed: int, *, subtract: float
) -> np.ndarray:
    """uint8[grid.nbytes(n)]: x / its block's scale, rounded at random to a neighbour on the grid.

    Unbiased up to the largest number of the grid; larger entries are clipped to it. The draw for
    entry i depends on (seed, i) only. x becomes x - subtract * (rounded x): with 1, the error.
    """
    nbytes, width = grid.nbytes(x.size), _stream_width(grid)
    out = np.empty(-(-nbytes // 4), np.uint32)
    _kernels().quantize(
        x,
        scales,
        grid.limits(scales),
        block,
        grid.kind == "powers",
        width,
        np.uint64(seed),
        x if subtract else _NOTHING,
        np.float32(subtract),
        out if width else out.view(np.uint8)[:nbytes],
    )
    return out.view(np.uint8)[:nbytes]


def add_quantized(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, block: int, grid: Grid, weight: float
) -> None:
    """x += weight * the numbers that `quantize` coded."""
    width = _stream_width(grid)
    _kernels().add_quantized(
        x,
        _words(codes) if width else codes,
        scales,
        block,
        grid.kind == "powers",
        width,
        np.float32(weight),
    )


def shorten(
    x: np.ndarray, width: int, shift: int, seed: int | None, *, subtract: float
) -> np.ndarray:
    """uint8[ceil(n * width / 8)]: the upper `width` bits of each x_i * 2**shift.

    Without a seed the lower bits are dropped, which rounds towards 0. With a seed, rounding is
    random, and unbiased below the largest number of `width` bits. x becomes
    x - subtract * (shortened x): with 1, the error.
    """
    nbytes = bits_nbytes(x.size, width)
    out = np.empty(-(-nbytes // 4), np.uint32)
    dither, lost = seed is not None, x if subtract else _NOTHING
    factor = np.float32(2.0**shift)
    share = np.float32(subtract)
    _kernels().shorten(x, width, factor, np.uint64(seed or 0), dither, lost, share, out)
    return out.view(np.uint8)[:nbytes]


def add_shortened(x: np.ndarray, codes: np.ndarray, width: int, shift: int, weight: float) -> None:
    """x += weight * the numbers that `shorten` coded."""
    _kernels().add_shortened(x, _words(codes), width, np.float32(2.0**shift), np.float32(weight))


def add_sides(
    x: np.ndarray, bits: np.ndarray, high: np.ndarray, low: np.ndarray, block: int, weight: float
) -> None:
    """x += weight * (its block's `high` where the bit is set, `low` elsewhere)."""
    _kernels().add_sides(x, bits, high, low, block, np.float32(weight))


def take_slices(x: np.ndarray, slices: Sequence[tuple[int, int]]) -> np.ndarray:
    """Copies of x[start:stop] of all slices, concatenated, as float32 on the host."""
    return np.concatenate([x[start:stop] for start, stop in slices] or [x[:0]])


def put_slices(x: np.ndarray, slices: Sequence[tuple[int, int]], values: np.ndarray) -> None:
    """x[start:stop] = the next values; slices are within bounds and do not overlap."""
    done = 0
    for start, stop in slices:
        x[start:stop] = values[done : done + stop - start]
        done += stop - start


def add_slices(
    x: np.ndarray, slices: Sequence[tuple[int, int]], values: np.ndarray, weight: float
) -> None:
    """x[start:stop] += weight * the next values; slices as in `put_slices`."""
    done = 0
    for start, stop in slices:
        x[start:stop] += np.float32(weight) * values[done : done + stop - start]
        done += stop - start


def largest_code(codes: np.ndarray, width: int, n: int, mask: int) -> int:
    """The largest of n codes of `width` bits after `& mask`; 0 if there are none."""
    return int(_kernels().largest_code(_words(codes), width, n, mask))


def random_words(seed: int, count: int) -> np.ndarray:
    """uint64[count]: the random words of a seed, as quantizers use them."""
    out = np.empty(count, np.uint64)
    _kernels().draw(np.uint64(seed), 0, out)
    return out


def _stream_width(grid: Grid) -> int:
    return 0 if grid.kind == "ternary" else grid.width


def _words(codes: np.ndarray) -> np.ndarray:
    """Packed codes as uint32 words, with a spare word that readers may access."""
    words = np.zeros(codes.size // 4 + 2, np.uint32)
    words.view(np.uint8)[: codes.size] = codes
    return words


def _kernels() -> ModuleType:
    """The compiled kernels, imported at their first use (importing Numba takes a while)."""
    from ef_horovod.arrays import kernels_quantize

    return kernels_quantize
