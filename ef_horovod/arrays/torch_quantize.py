"""Array functions of the quantizers, for torch; `arrays/torch.py` re-exports them.

Off the CPU, random bits are computed on the device from the same integers as on the host, so that
payloads are equal. Sums of blocks are added in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ef_horovod.arrays.grid import Grid, bits_nbytes, blocks
from ef_horovod.arrays.numpy_quantize import __all__ as __all__
from ef_horovod.arrays.torch_device import from_host, kernel, pack_codes, to_host, unpack_codes

_WORK = 1 << 22  # entries handled at once where a device op needs temporaries


@kernel
def block_max(x: torch.Tensor, block: int) -> np.ndarray:
    order = x.view(torch.int32) & 0x7FFFFFFF  # NaN ranks above infinity, as on the host
    return _by_block(order, block, lambda rows: rows.amax(1)).view(np.float32)


@kernel
def block_squares(x: torch.Tensor, block: int) -> np.ndarray:
    return _by_block(x, block, lambda rows: rows.double().square().sum(1))


@kernel
def block_halves(x: torch.Tensor, block: int) -> np.ndarray:
    def high(rows: torch.Tensor) -> torch.Tensor:
        return torch.where(rows >= 0, rows, 0.0).sum(1, dtype=torch.float64)

    def low(rows: torch.Tensor) -> torch.Tensor:
        return torch.where(rows >= 0, 0.0, rows).sum(1, dtype=torch.float64)

    def number(rows: torch.Tensor) -> torch.Tensor:
        return (rows >= 0).sum(1).double()

    return np.stack([_by_block(x, block, reduce) for reduce in (high, low, number)])


@kernel
def quantize(
    x: torch.Tensor, scales: np.ndarray, block: int, grid: Grid, seed: int, *, subtract: float
) -> np.ndarray:
    limits, stretch = grid.limits(scales), from_host(scales, x.device)
    most, safe = from_host(limits, x.device), from_host(_safe(scales, limits), x.device)
    packed = []
    for start, part in _parts(x):
        b = torch.arange(start, start + part.numel(), device=x.device) // block
        place = torch.minimum(part.abs() / safe[b], most[b])
        levels = _round(place, _random(seed, start, part.numel(), x.device), grid)
        codes = levels | ((part < 0).long() << (grid.width - 1))
        packed.append(
            to_host(_pack_ternary(codes) if _ternary(grid) else pack_codes(codes, grid.width))
        )
        if subtract:
            part.sub_(_values(codes, stretch[b], grid) * subtract)
    return np.concatenate([*packed, np.empty(0, np.uint8)])


@kernel
def add_quantized(
    x: torch.Tensor, codes: np.ndarray, scales: np.ndarray, block: int, grid: Grid, weight: float
) -> None:
    stretch = from_host(scales, x.device)
    for start, part in _parts(x):
        b = torch.arange(start, start + part.numel(), device=x.device) // block
        own = from_host(codes[grid.nbytes(start) : grid.nbytes(start + part.numel())], x.device)
        if _ternary(grid):
            numbers = _unpack_ternary(own, part.numel())
        else:
            numbers = unpack_codes(own, grid.width, part.numel())
        part.add_(_values(numbers, stretch[b], grid) * weight)


@kernel
def shorten(
    x: torch.Tensor, width: int, shift: int, seed: int | None, *, subtract: float
) -> np.ndarray:
    drop, most = 32 - width, (0x7F800000 >> (32 - width)) - 1
    packed = []
    for start, part in _parts(x):
        bits = (part * 2.0**shift).view(torch.int32).long()
        magnitudes = bits & 0x7FFFFFFF
        if seed is not None:
            magnitudes += _random(seed, start, part.numel(), x.device) >> width
        codes = (magnitudes >> drop).clamp(max=most) | ((bits < 0).long() << (width - 1))
        packed.append(to_host(pack_codes(codes, width)))
        if subtract:
            part.sub_(_lengthen(codes, width, shift) * subtract)
    return np.concatenate([*packed, np.empty(0, np.uint8)])


@kernel
def add_shortened(
    x: torch.Tensor, codes: np.ndarray, width: int, shift: int, weight: float
) -> None:
    for start, part in _parts(x):
        stop = start + part.numel()
        own = from_host(codes[bits_nbytes(start, width) : bits_nbytes(stop, width)], x.device)
        part.add_(_lengthen(unpack_codes(own, width, part.numel()), width, shift) * weight)


@kernel
def add_sides(
    x: torch.Tensor, bits: np.ndarray, high: np.ndarray, low: np.ndarray, block: int, weight: float
) -> None:
    above, below = from_host(high, x.device), from_host(low, x.device)
    packed = from_host(bits, x.device)
    for start, part in _parts(x):
        b = torch.arange(start, start + part.numel(), device=x.device) // block
        signs = unpack_codes(packed[start // 8 : (start + part.numel() + 7) // 8], 1, part.numel())
        part.add_(torch.where(signs.bool(), above[b], below[b]) * weight)


@kernel
def take_slices(x: torch.Tensor, slices: Sequence[tuple[int, int]]) -> np.ndarray:
    return to_host(torch.cat([x[start:stop] for start, stop in slices] or [x[:0]]))


@kernel
def put_slices(x: torch.Tensor, slices: Sequence[tuple[int, int]], values: np.ndarray) -> None:
    for part, own in _pairs(x, slices, values):
        part.copy_(own)


@kernel
def add_slices(
    x: torch.Tensor, slices: Sequence[tuple[int, int]], values: np.ndarray, weight: float
) -> None:
    for part, own in _pairs(x, slices, values):
        part.add_(own * weight)


def _by_block(
    x: torch.Tensor, block: int, reduce: Callable[[torch.Tensor], torch.Tensor]
) -> np.ndarray:
    """`reduce` over rows of whole blocks and over the rest, on the host."""
    whole, step = x.numel() // block, max(1, _WORK // block)
    rows = x[: whole * block].view(whole, block)
    found = [reduce(rows[b : b + step]) for b in range(0, whole, step)]
    if whole < blocks(x.numel(), block) or not found:
        found.append(reduce(x[whole * block :].view(1, -1)) if x.numel() else reduce(x.view(0, 1)))
    return to_host(torch.cat(found))


def _parts(x: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(start, part of x); parts start at whole bytes of codes and of base-3 digits."""
    step = _WORK - _WORK % 40
    for start in range(0, x.numel(), step):
        yield start, x[start : start + step]


def _pairs(
    x: torch.Tensor, slices: Sequence[tuple[int, int]], values: np.ndarray
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(a slice of x, its values)."""
    own, done = from_host(values, x.device).to(x.dtype), 0
    for start, stop in slices:
        yield x[start:stop], own[done : done + stop - start]
        done += stop - start


def _random(seed: int, start: int, n: int, device: torch.device) -> torch.Tensor:
    """int64[n] below 2**32: see `draw` in the host's kernels."""
    j = torch.arange(start // 2 + 1, start // 2 + 1 + (n + 1) // 2, device=device)
    z = j * _signed(0x9E3779B97F4A7C15) + _signed(seed)  # int64 products wrap around
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shifted(z, 31)
    return torch.stack([z & 0xFFFFFFFF, _shifted(z, 32)], 1).view(-1)[:n]


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)


def _round(place: torch.Tensor, random: torch.Tensor, grid: Grid) -> torch.Tensor:
    dice = (random >> 8).float() * 2.0**-24
    if grid.kind != "powers":
        below = place.floor()
        return below.long() + (dice < place - below)
    large = ((place.view(torch.int32).long() + (random >> 9)) >> 23) - 126
    return torch.where(place < 1, (dice < place).long(), large)


def _values(codes: torch.Tensor, stretch: torch.Tensor, grid: Grid) -> torch.Tensor:
    levels = codes & ((1 << (grid.width - 1)) - 1)
    if grid.kind == "powers":
        bits = torch.where(levels > 0, (levels + 126) << 23, 0)
        numbers = bits.to(torch.int32).view(torch.float32)
    else:
        numbers = levels.float()
    return torch.where(codes > levels, -(numbers * stretch), numbers * stretch)


def _lengthen(codes: torch.Tensor, width: int, shift: int) -> torch.Tensor:
    bits = codes << (32 - width)
    bits = bits - ((bits >> 31) << 32)  # into the range of int32
    return bits.to(torch.int32).view(torch.float32) * 2.0**-shift


def _pack_ternary(codes: torch.Tensor) -> torch.Tensor:
    digits = (codes & 1) + (codes & (codes >> 1))
    groups = torch.nn.functional.pad(digits, (0, -codes.numel() % 5)).view(-1, 5)
    weights = torch.tensor([1, 3, 9, 27, 81], device=codes.device)
    return (groups * weights).sum(1).to(torch.uint8)


def _unpack_ternary(packed: torch.Tensor, n: int) -> torch.Tensor:
    weights = torch.tensor([1, 3, 9, 27, 81], device=packed.device)
    digits = ((packed.long().unsqueeze(1) // weights) % 3).view(-1)[:n]
    return digits | (digits >> 1)


def _ternary(grid: Grid) -> bool:
    return grid.kind == "ternary"


def _safe(scales: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Scales as divisors: 1 for blocks of zeros."""
    return np.where(limits > 0, scales, np.float32(1)).astype(np.float32)
