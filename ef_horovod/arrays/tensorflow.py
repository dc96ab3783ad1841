"""Array functions for TensorFlow tensors and variables, computed on the host.

The NumPy functions of the same names do the work, so bits are equal. A tensor or variable on the
CPU is read where it lies; one on a GPU is copied to the host first. A variable is changed in place
by a copy of its values that is assigned to it. Tensors cannot be changed. New vectors are NumPy
arrays, and so is error-feedback state, also for variables on a GPU. So the functions take NumPy
arrays, too, which are changed where they lie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import tensorflow as tf

import ef_horovod.arrays.numpy as host
from ef_horovod.arrays.numpy import Like
from ef_horovod.arrays.numpy import zeros as zeros


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
    """x as float32[n]: a NumPy view of its memory, or a copy.

    With `writable` a float32[n] variable itself, and a copy of anything else.
    """
    if writable and isinstance(x, tf.Variable) and x.dtype == tf.float32 and x.shape.rank == 1:
        return x
    return host.flat_float32(to_host(x), writable=writable)


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


def host_view(x: tf.Variable | np.ndarray) -> np.ndarray | None:
    """None for a variable: nothing may write into its memory."""
    return x if isinstance(x, np.ndarray) else None


def address(x: tf.Tensor | tf.Variable | np.ndarray) -> int:
    """Equal only for the same variable, because variables have no views."""
    return host.address(x) if isinstance(x, np.ndarray) else id(x)


def to_host(x: tf.Tensor | tf.Variable) -> np.ndarray:
    """The current values of x as a read-only NumPy array, sharing memory on the CPU.

    Raises:
        TypeError: x is a symbolic tensor, of a tf.function that is being traced.
    """
    tensor = tf.convert_to_tensor(x)
    if not hasattr(tensor, "numpy"):
        raise TypeError(
            f"got the symbolic tensor {x.name!r} of a tf.function, expected an eager one; "
            "compress inside tf.numpy_function, or outside of the function"
        )
    return np.asarray(tensor)


def from_host(values: np.ndarray, device: str | None = None) -> tf.Tensor:
    """A host array as a tensor on `device`, or where TensorFlow puts it."""
    with _on(device):
        return tf.convert_to_tensor(values)


def read(x: tf.Variable, start: int, stop: int) -> np.ndarray:
    """A copy of x[start:stop] on the host, for checkpoints."""
    return _of(x)[start:stop].copy()


def assign(x: tf.Variable | np.ndarray, y: tf.Tensor | tf.Variable | np.ndarray) -> None:
    """x = y."""
    if isinstance(x, np.ndarray):
        host.assign(x, _of(y))
    else:
        x.assign(y)


def _on(device: str | None) -> AbstractContextManager[Any]:
    """Context that places ops on `device`; None keeps the caller's placement."""
    return nullcontext() if device is None else tf.device(device)


def _of(values: Any) -> Any:
    return to_host(values) if isinstance(values, tf.Tensor | tf.Variable) else values


def _reads(function: Callable[..., Any]) -> Callable[..., Any]:
    """A NumPy function of an array that it does not change, for tensors and variables."""

    @functools.wraps(function)
    def run(x: Any, *args: Any, **options: Any) -> Any:
        return function(_of(x), *map(_of, args), **options)

    return run


def _changes(function: Callable[..., Any]) -> Callable[..., Any]:
    """A NumPy function that changes its array, or `out`, or nothing with `subtract=False`."""
    reads = _reads(function)

    @functools.wraps(function)
    def run(x: Any, *args: Any, out: Any = None, **options: Any) -> Any:
        changed = x if out is None else out
        if isinstance(changed, np.ndarray) or not options.get("subtract", True):
            return reads(x, *args, **options, **({} if out is None else {"out": out}))
        room = np.array(to_host(changed))
        more = {} if out is None else {"out": room}
        result = reads(room if changed is x else x, *args, **options, **more)
        changed.assign(room)
        return result

    return run


fill = _changes(host.fill)
write = _changes(host.write)
divide = _changes(host.divide)
divide_checked = _changes(host.divide_checked)
add = _changes(host.add)
average = _changes(host.average)
average_square = _changes(host.average_square)
divide_by_root = _changes(host.divide_by_root)
multiply_by_root = _changes(host.multiply_by_root)
scatter_add = _changes(host.scatter_add)
scatter_put = _changes(host.scatter_put)
pack_signs = _changes(host.pack_signs)
add_signs = _changes(host.add_signs)
narrow = _changes(host.narrow)
add_widened = _changes(host.add_widened)
quantize = _changes(host.quantize)
add_quantized = _changes(host.add_quantized)
shorten = _changes(host.shorten)
add_shortened = _changes(host.add_shortened)
add_sides = _changes(host.add_sides)
put_slices = _changes(host.put_slices)
add_slices = _changes(host.add_slices)
add_products = _changes(host.add_products)

abs_sum = _reads(host.abs_sum)
abs_max = _reads(host.abs_max)
squared_norm = _reads(host.squared_norm)
top_k = _reads(host.top_k)
at_least = _reads(host.at_least)
take = _reads(host.take)
take_slices = _reads(host.take_slices)
block_max = _reads(host.block_max)
block_squares = _reads(host.block_squares)
block_halves = _reads(host.block_halves)
factors = _reads(host.factors)
encode_indices = _reads(host.encode_indices)
decode_indices = _reads(host.decode_indices)
