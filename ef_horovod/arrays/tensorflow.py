"""Array functions for TensorFlow tensors and variables.

Eager tensors cannot be changed in place. A tensor is processed as a NumPy array that shares its
memory (GPU tensors are copied to the host); the result is a tensor again. Flat vectors that stay on
a device are private `tf.Variable`s, float32[n]. TensorFlow's own ops process them on the device,
and only payloads are copied to the host. A named device means a variable there, also on the CPU,
where tests run these ops. None means a NumPy array.

Most TensorFlow arithmetic treats numbers below 2**-126 as zero; NumPy does not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

import ef_horovod.arrays.numpy as host
from ef_horovod.arrays.numpy import Like
from ef_horovod.arrays.tensorflow_device import from_host as from_host
from ef_horovod.arrays.tensorflow_device import kernel as _kernel
from ef_horovod.arrays.tensorflow_device import on as _on
from ef_horovod.arrays.tensorflow_device import parts as _parts
from ef_horovod.arrays.tensorflow_device import put as _put
from ef_horovod.arrays.tensorflow_device import to_host as to_host
from ef_horovod.arrays.tensorflow_matrices import *  # noqa: F403 - low rank
from ef_horovod.arrays.tensorflow_quantize import *  # noqa: F403 - the quantizers' part

_WORK = 1 << 22  # entries handled at once where an op needs temporaries; a multiple of 8


def like(x: tf.Tensor | tf.Variable) -> Like:
    """Shape and dtype of x, and the device of a variable, without keeping x alive."""
    import ef_horovod.arrays.tensorflow as xp

    return Like(xp, tuple(x.shape), x.dtype, x.device if isinstance(x, tf.Variable) else None)


def is_float(x: tf.Tensor | tf.Variable) -> bool:
    """Whether x holds floating-point numbers; only these can be compressed."""
    return bool(x.dtype.is_floating)


def why_not_writable(x: tf.Tensor | tf.Variable) -> str:
    """Why x cannot be changed in place; empty if it can."""
    return "" if isinstance(x, tf.Variable) else "is a tensor of TensorFlow, not a variable"


def is_float64(x: tf.Tensor | tf.Variable) -> bool:
    """Whether x has more precision than the float32 of payloads."""
    return bool(x.dtype == tf.float64)


def detached(x: tf.Tensor | tf.Variable) -> tf.Tensor:
    """x itself, outside of any automatic differentiation."""
    return tf.stop_gradient(x)


def flat_float32(x: tf.Tensor | tf.Variable, *, writable: bool = False) -> np.ndarray | tf.Variable:
    """x as float32[n].

    A tensor becomes a NumPy view of its memory, or with `writable` a copy. A float32[n] variable is
    returned as it is, another one is copied to a new variable on its device.
    """
    if not isinstance(x, tf.Variable):
        return host.flat_float32(to_host(x), writable=writable)
    if x.dtype == tf.float32 and x.shape.rank == 1:
        return x
    flat = device_zeros(x.shape.num_elements(), x.device)
    with tf.device(x.device):
        flat.assign(tf.cast(tf.reshape(x, [-1]), tf.float32))
    return flat


def shaped(flat: np.ndarray | tf.Variable, target: Like) -> tf.Tensor | tf.Variable:
    """A flat float32[n] in the shape of `target`; a variable of that shape is not copied."""
    if isinstance(flat, tf.Variable) and tuple(flat.shape) == target.shape:
        return flat
    with _on(target.device):
        return tf.reshape(flat, target.shape)


def restore(flat: np.ndarray | tf.Variable, target: Like) -> tf.Tensor:
    """A flat float32[n] as a tensor of the shape, dtype and device of `target`."""
    with _on(target.device):
        return tf.cast(tf.reshape(flat, target.shape), target.dtype)


def zeros(length: int, device: str | None = None) -> np.ndarray | tf.Variable:
    """float32[length] of zeros: a variable on `device`, or a NumPy array if it is None."""
    return host.zeros(length) if device is None else device_zeros(length, device)


def device_zeros(length: int, device: str) -> tf.Variable:
    """float32[length] of zeros as a variable on `device`, which may be the CPU."""
    with tf.init_scope(), tf.device(device):  # also while a tf.function is traced
        return tf.Variable(tf.zeros(length), trainable=False)


def host_view(x: tf.Variable) -> None:
    """None: variables have no NumPy views."""


def address(x: tf.Tensor | tf.Variable) -> int:
    """Equal only for the same variable, because variables have no views."""
    return id(x)


@_kernel
def fill(x: tf.Variable, value: float) -> None:
    x.assign(tf.fill(x.shape, np.float32(value)))


@_kernel
def assign(x: tf.Variable, y: tf.Tensor | tf.Variable) -> None:
    x.assign(y)


def read(x: tf.Variable, start: int, stop: int) -> np.ndarray:
    """A copy of x[start:stop] on the host, for checkpoints."""
    return np.array(x[start:stop])


def write(x: tf.Variable, start: int, values: tf.Tensor | np.ndarray) -> None:
    """x[start : start + n] = values, of n numbers in any shape and float dtype."""
    with tf.device(x.device):
        _put(x, start, tf.cast(tf.reshape(values, [-1]), tf.float32))


@_kernel
def divide(x: tf.Tensor | tf.Variable, divisor: float, out: tf.Variable) -> None:
    out.assign(tf.convert_to_tensor(x) / np.float32(divisor))


@_kernel
def divide_checked(x: tf.Tensor | tf.Variable, divisor: float, out: tf.Variable) -> bool:
    quotient = tf.convert_to_tensor(x) / np.float32(divisor)
    out.assign(quotient)
    return bool(tf.reduce_all(tf.math.is_finite(quotient)))


@_kernel
def add(x: tf.Variable, y: tf.Tensor | tf.Variable, weight: float = 1.0) -> None:
    x.assign_add(y if weight == 1.0 else tf.multiply(y, np.float32(weight)))


@_kernel
def average(x: tf.Variable, y: tf.Tensor | tf.Variable, weight: float, out: tf.Variable) -> None:
    out.assign(tf.multiply(x, np.float32(1.0 - weight)) + tf.multiply(y, np.float32(weight)))


@_kernel
def abs_sum(x: tf.Variable) -> float:
    return _sum(x, tf.abs)


@_kernel
def abs_max(x: tf.Tensor | tf.Variable) -> float:
    if x.shape[0] == 0:
        return 0.0
    # Whether a maximum propagates NaN depends on the device.
    finite = tf.where(tf.math.is_finite(x), tf.abs(x), np.float32(np.inf))
    return float(tf.reduce_max(finite))


@_kernel
def squared_norm(x: tf.Variable) -> float:
    return _sum(x, tf.square)


@_kernel
def top_k(x: tf.Variable, k: int) -> tuple[np.ndarray, np.ndarray]:
    k = min(k, x.shape[0])
    # As integers, magnitudes sort like floats with infinity and NaN at the top, as on the host.
    # TensorFlow documents that among equals the lower index comes first.
    whole = tf.convert_to_tensor(x)
    order = tf.bitwise.bitwise_and(tf.bitcast(whole, tf.int32), 0x7FFFFFFF)
    chosen = tf.math.top_k(order, k).indices
    indices, values = to_host(chosen).astype(np.int64), to_host(tf.gather(whole, chosen))
    ascending = np.argsort(indices)
    return indices[ascending], values[ascending]


@_kernel
def at_least(x: tf.Variable, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    whole = tf.convert_to_tensor(x)
    indices = tf.reshape(tf.where(~(tf.abs(whole) < np.float32(threshold))), [-1])
    return to_host(indices), to_host(tf.gather(whole, indices))


@_kernel
def encode_indices(x: tf.Variable, indices: np.ndarray) -> np.ndarray:
    return host.encode_indices(x, indices)


@_kernel
def decode_indices(x: tf.Variable, code: np.ndarray, k: int) -> np.ndarray:
    return host.decode_indices(x, code, k)


@_kernel
def take(x: tf.Variable, indices: np.ndarray) -> np.ndarray:
    return to_host(tf.gather(x, indices))


@_kernel
def scatter_add(x: tf.Variable, indices: np.ndarray, values: np.ndarray, weight: float) -> None:
    # The indices are distinct, so the order of additions does not matter.
    x.scatter_nd_add(indices[:, None], values * np.float32(weight))


@_kernel
def scatter_put(x: tf.Variable, indices: np.ndarray, values: np.ndarray) -> None:
    x.scatter_nd_update(indices[:, None], values)


@_kernel
def pack_signs(x: tf.Variable, scale: float, *, subtract: bool) -> np.ndarray:
    weights = np.array([1, 2, 4, 8, 16, 32, 64, 128], np.float32)
    packed = np.empty((x.shape[0] + 7) // 8, np.uint8)
    for start, part in _parts(x, _WORK):
        positive = part >= 0
        padded = tf.pad(tf.cast(positive, tf.float32), [[0, -part.shape[0] % 8]])
        octets = tf.reduce_sum(tf.reshape(padded, [-1, 8]) * weights, 1)  # exact: at most 255
        packed[start // 8 : (start + _WORK) // 8] = to_host(tf.cast(octets, tf.uint8))
        if subtract:
            _put(x, start, part - _signed(positive, scale))
    return packed


@_kernel
def add_signs(x: tf.Variable, bits: np.ndarray, scale: float) -> None:
    shifts = np.arange(8, dtype=np.uint8)
    for start, part in _parts(x, _WORK):
        octets = tf.convert_to_tensor(bits[start // 8 : (start + _WORK) // 8, None])
        signs = tf.bitwise.bitwise_and(tf.bitwise.right_shift(octets, shifts), np.uint8(1))
        positive = tf.reshape(tf.cast(signs, tf.bool), [-1])[: part.shape[0]]
        _put(x, start, part + _signed(positive, scale))


@_kernel
def narrow(x: tf.Variable, kind: str, shift: int, *, subtract: bool) -> np.ndarray:
    codes, largest = np.empty(x.shape[0], np.uint16), host.LARGEST[kind]
    for start, part in _parts(x, _WORK):
        scaled = tf.cast(tf.cast(part, tf.float64) * 2.0**shift, tf.float32)
        rounded = tf.cast(tf.clip_by_value(scaled, -largest, largest), kind)
        codes[start : start + _WORK] = to_host(tf.bitcast(rounded, tf.uint16))
        if subtract:
            _put(x, start, part - _widen(rounded, shift))
    return codes


@_kernel
def add_widened(x: tf.Variable, codes: np.ndarray, kind: str, shift: int, weight: float) -> None:
    for start, part in _parts(x, _WORK):
        half = tf.bitcast(tf.convert_to_tensor(codes[start : start + _WORK]), kind)
        _put(x, start, part + _widen(half, shift) * np.float32(weight))


def _widen(half: tf.Tensor, shift: int) -> tf.Tensor:
    return tf.cast(tf.cast(half, tf.float64) * 2.0**-shift, tf.float32)


def _signed(positive: tf.Tensor, scale: float) -> tf.Tensor:
    return tf.where(positive, np.float32(scale), np.float32(-scale))


def _sum(x: tf.Variable, term: Callable[[tf.Tensor], tf.Tensor]) -> float:
    parts = [tf.reduce_sum(term(tf.cast(part, tf.float64))) for _, part in _parts(x, _WORK)]
    return float(tf.add_n(parts)) if parts else 0.0
