"""Array functions of the quantizers, for TensorFlow variables on a device.

Random bits are computed on the device from the same integers as on the host, so that payloads are
equal. Sums of blocks are added in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from ef_horovod.arrays.grid import Grid, bits_nbytes, blocks
from ef_horovod.arrays.numpy_quantize import __all__ as __all__
from ef_horovod.arrays.tensorflow_device import kernel, parts, put, to_host

_WORK = 1 << 22  # entries handled at once where an op needs temporaries
_and, _or, _xor = tf.bitwise.bitwise_and, tf.bitwise.bitwise_or, tf.bitwise.bitwise_xor


@kernel
def block_max(x: tf.Variable, block: int) -> np.ndarray:
    order = _and(tf.bitcast(tf.convert_to_tensor(x), tf.int32), 0x7FFFFFFF)  # NaN ranks highest
    return _by_block(order, block, lambda rows: tf.reduce_max(rows, 1)).view(np.float32)


@kernel
def block_squares(x: tf.Variable, block: int) -> np.ndarray:
    def squares(rows: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.square(tf.cast(rows, tf.float64)), 1)

    return _by_block(tf.convert_to_tensor(x), block, squares)


@kernel
def block_halves(x: tf.Variable, block: int) -> np.ndarray:
    def high(rows: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.cast(tf.where(rows >= 0, rows, 0.0), tf.float64), 1)

    def low(rows: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.cast(tf.where(rows >= 0, 0.0, rows), tf.float64), 1)

    def number(rows: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.cast(rows >= 0, tf.float64), 1)

    whole = tf.convert_to_tensor(x)
    return np.stack([_by_block(whole, block, reduce) for reduce in (high, low, number)])


@kernel
def quantize(
    x: tf.Variable, scales: np.ndarray, block: int, grid: Grid, seed: int, *, subtract: float
) -> np.ndarray:
    limits = grid.limits(scales)
    safe, packed = np.where(limits > 0, scales, np.float32(1)).astype(np.float32), []
    for start, part in parts(x, _step()):
        place = tf.abs(part) / _spread(safe, start, part, block)
        place = tf.minimum(place, _spread(limits, start, part, block))
        levels = _round(place, _random(seed, start, part.shape[0]), grid)
        codes = _or(levels, _left(tf.cast(part < 0, tf.int64), grid.width - 1))
        if grid.kind == "ternary":
            packed.append(to_host(_pack_ternary(codes)))
        else:
            packed.append(to_host(_pack(codes, grid.width)))
        if subtract:
            values = _values(codes, _spread(scales, start, part, block), grid)
            put(x, start, part - values * np.float32(subtract))
    return np.concatenate([*packed, np.empty(0, np.uint8)])


@kernel
def add_quantized(
    x: tf.Variable, codes: np.ndarray, scales: np.ndarray, block: int, grid: Grid, weight: float
) -> None:
    for start, part in parts(x, _step()):
        n = part.shape[0]
        own = tf.convert_to_tensor(codes[grid.nbytes(start) : grid.nbytes(start + n)])
        ternary = grid.kind == "ternary"
        numbers = _unpack_ternary(own, n) if ternary else _unpack(own, grid.width, n)
        values = _values(numbers, _spread(scales, start, part, block), grid)
        put(x, start, part + values * np.float32(weight))


@kernel
def shorten(
    x: tf.Variable, width: int, shift: int, seed: int | None, *, subtract: float
) -> np.ndarray:
    drop, most, packed = 32 - width, (0x7F800000 >> (32 - width)) - 1, []
    for start, part in parts(x, _step()):
        bits = tf.cast(tf.bitcast(part * np.float32(2.0**shift), tf.int32), tf.int64)
        magnitudes = _and(bits, 0x7FFFFFFF)
        if seed is not None:
            magnitudes += _right(_random(seed, start, part.shape[0]), width)
        signs = _left(tf.cast(bits < 0, tf.int64), width - 1)
        codes = _or(tf.minimum(_right(magnitudes, drop), most), signs)
        packed.append(to_host(_pack(codes, width)))
        if subtract:
            put(x, start, part - _lengthen(codes, width, shift) * np.float32(subtract))
    return np.concatenate([*packed, np.empty(0, np.uint8)])


@kernel
def add_shortened(x: tf.Variable, codes: np.ndarray, width: int, shift: int, weight: float) -> None:
    for start, part in parts(x, _step()):
        stop = start + part.shape[0]
        own = tf.convert_to_tensor(codes[bits_nbytes(start, width) : bits_nbytes(stop, width)])
        values = _lengthen(_unpack(own, width, part.shape[0]), width, shift)
        put(x, start, part + values * np.float32(weight))


@kernel
def add_sides(
    x: tf.Variable, bits: np.ndarray, high: np.ndarray, low: np.ndarray, block: int, weight: float
) -> None:
    for start, part in parts(x, _step()):
        n = part.shape[0]
        own = tf.convert_to_tensor(bits[start // 8 : (start + n + 7) // 8])
        sides = [_spread(side, start, part, block) for side in (high, low)]
        values = tf.where(_unpack(own, 1, n) > 0, *sides)
        put(x, start, part + values * np.float32(weight))


@kernel
def take_slices(x: tf.Variable, slices: Sequence[tuple[int, int]]) -> np.ndarray:
    whole = tf.convert_to_tensor(x)
    return to_host(tf.concat([whole[start:stop] for start, stop in slices] or [whole[:0]], 0))


@kernel
def put_slices(x: tf.Variable, slices: Sequence[tuple[int, int]], values: np.ndarray) -> None:
    done = 0
    for start, stop in slices:
        put(x, start, tf.convert_to_tensor(values[done : done + stop - start]))
        done += stop - start


@kernel
def add_slices(
    x: tf.Variable, slices: Sequence[tuple[int, int]], values: np.ndarray, weight: float
) -> None:
    whole, done = tf.convert_to_tensor(x), 0
    for start, stop in slices:
        own = values[done : done + stop - start] * np.float32(weight)
        put(x, start, whole[start:stop] + own)
        done += stop - start


def _by_block(whole: tf.Tensor, block: int, reduce: Callable[[tf.Tensor], tf.Tensor]) -> np.ndarray:
    """`reduce` over rows of whole blocks and over the rest, on the host."""
    n = whole.shape[0]
    count, step = n // block, max(1, _WORK // block)
    rows = tf.reshape(whole[: count * block], [count, block])
    found = [reduce(rows[b : b + step]) for b in range(0, count, step)]
    if count < blocks(n, block):
        found.append(reduce(whole[None, count * block :]))
    return to_host(tf.concat(found or [reduce(whole[None][:0])], 0))


def _step() -> int:
    return _WORK - _WORK % 40  # parts start at whole bytes of codes and of base-3 digits


def _spread(numbers: np.ndarray, start: int, part: tf.Tensor, block: int) -> tf.Tensor:
    """For each entry of the part from `start` on, the item of `numbers` for its block."""
    own = tf.range(start, start + part.shape[0], dtype=tf.int64) // block
    return tf.gather(tf.convert_to_tensor(numbers), own)


def _random(seed: int, start: int, n: int) -> tf.Tensor:
    """int64[n] below 2**32: see `draw` in the host's kernels."""
    j = tf.range(start // 2 + 1, start // 2 + 1 + (n + 1) // 2, dtype=tf.int64)
    z = j * _signed(0x9E3779B97F4A7C15) + _signed(seed)  # int64 products wrap around
    z = _xor(z, _logical(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = _xor(z, _logical(z, 27)) * _signed(0x94D049BB133111EB)
    z = _xor(z, _logical(z, 31))
    return tf.reshape(tf.stack([_and(z, 0xFFFFFFFF), _logical(z, 32)], 1), [-1])[:n]


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _logical(z: tf.Tensor, by: int) -> tf.Tensor:
    return _and(_right(z, by), (1 << (64 - by)) - 1)


def _left(z: tf.Tensor, by: int) -> tf.Tensor:
    return tf.bitwise.left_shift(z, tf.cast(by, z.dtype))


def _right(z: tf.Tensor, by: int) -> tf.Tensor:
    return tf.bitwise.right_shift(z, tf.cast(by, z.dtype))


def _round(place: tf.Tensor, random: tf.Tensor, grid: Grid) -> tf.Tensor:
    dice = tf.cast(_right(random, 8), tf.float32) * np.float32(2.0**-24)
    if grid.kind != "powers":
        below = tf.floor(place)
        return tf.cast(below, tf.int64) + tf.cast(dice < place - below, tf.int64)
    bits = tf.cast(tf.bitcast(place, tf.int32), tf.int64)
    large = _right(bits + _right(random, 9), 23) - 126
    return tf.where(place < 1, tf.cast(dice < place, tf.int64), large)


def _values(codes: tf.Tensor, stretch: tf.Tensor, grid: Grid) -> tf.Tensor:
    levels = _and(codes, (1 << (grid.width - 1)) - 1)
    if grid.kind == "powers":
        bits = tf.where(levels > 0, _left(levels + 126, 23), tf.zeros_like(levels))
        numbers = tf.bitcast(tf.cast(bits, tf.int32), tf.float32)
    else:
        numbers = tf.cast(levels, tf.float32)
    return tf.where(codes > levels, -(numbers * stretch), numbers * stretch)


def _lengthen(codes: tf.Tensor, width: int, shift: int) -> tf.Tensor:
    bits = _left(codes, 32 - width)
    bits = bits - _left(_right(bits, 31), 32)  # into the range of int32
    return tf.bitcast(tf.cast(bits, tf.int32), tf.float32) * np.float32(2.0**-shift)


def _pack(codes: tf.Tensor, width: int) -> tf.Tensor:
    """Codes packed without gaps, lowest bit first: eight codes take `width` bytes."""
    groups = tf.reshape(tf.pad(codes, [[0, -codes.shape[0] % 8]]), [-1, 8])
    columns = []
    for j in range(width):
        byte = tf.zeros_like(groups[:, 0])
        for k in range(8 * j // width, (8 * j + 7) // width + 1):
            shift = k * width - 8 * j
            own = groups[:, k]
            byte = _or(byte, _left(own, shift) if shift >= 0 else _right(own, -shift))
        columns.append(tf.cast(_and(byte, 255), tf.uint8))
    return tf.reshape(tf.stack(columns, 1), [-1])[: bits_nbytes(codes.shape[0], width)]


def _unpack(packed: tf.Tensor, width: int, n: int) -> tf.Tensor:
    """int64[n]: the reverse of `_pack`."""
    filled = tf.pad(packed, [[0, -packed.shape[0] % width]])
    groups = tf.cast(tf.reshape(filled, [-1, width]), tf.int64)
    columns = []
    for k in range(8):
        code = tf.zeros_like(groups[:, 0])
        for j in range(k * width // 8, (k * width + width - 1) // 8 + 1):
            shift = 8 * j - k * width
            own = groups[:, j]
            code = _or(code, _left(own, shift) if shift >= 0 else _right(own, -shift))
        columns.append(_and(code, (1 << width) - 1))
    return tf.reshape(tf.stack(columns, 1), [-1])[:n]


def _pack_ternary(codes: tf.Tensor) -> tf.Tensor:
    digits = _and(codes, 1) + _and(codes, _right(codes, 1))
    groups = tf.reshape(tf.pad(digits, [[0, -codes.shape[0] % 5]]), [-1, 5])
    weights = tf.constant([1, 3, 9, 27, 81], tf.int64)
    return tf.cast(tf.reduce_sum(groups * weights, 1), tf.uint8)


def _unpack_ternary(packed: tf.Tensor, n: int) -> tf.Tensor:
    weights = tf.constant([1, 3, 9, 27, 81], tf.int64)
    digits = tf.reshape((tf.cast(packed, tf.int64)[:, None] // weights) % 3, [-1])[:n]
    return _or(digits, _right(digits, 1))
