"""TensorFlow tensors: taken and given back as tensors, worked on as NumPy arrays in between.

Eager tensors cannot be changed in place, so the flat vectors that compressors work on are NumPy
arrays that share memory with the tensor where they can. Tensors of a GPU are copied to the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

import ef_horovod.arrays.numpy as host
from ef_horovod.arrays.numpy import Like, zeros

__all__ = [
    "detached", "flat_float32", "from_host", "is_float", "is_float64", "like", "restore", "shaped",
    "to_host", "zeros",
]  # fmt: skip


def like(x: tf.Tensor) -> Like:
    """Shape and dtype of x, without keeping x alive."""
    import ef_horovod.arrays.tensorflow as xp

    return Like(xp, tuple(x.shape), x.dtype, None)


def is_float(x: tf.Tensor) -> bool:
    """Whether x holds floating-point numbers, which alone can be compressed."""
    return bool(x.dtype.is_floating)


def is_float64(x: tf.Tensor) -> bool:
    """Whether x has more precision than the float32 that is sent."""
    return bool(x.dtype == tf.float64)


def detached(x: tf.Tensor) -> tf.Tensor:
    """x itself, outside of any automatic differentiation."""
    return tf.stop_gradient(x)


def flat_float32(x: tf.Tensor, *, writable: bool = False) -> np.ndarray:
    """x as contiguous NumPy float32[n]: a view of its memory, or with `writable` a copy."""
    return host.flat_float32(to_host(x), writable=writable)


def shaped(flat: np.ndarray, target: Like) -> tf.Tensor:
    """A flat float32[n] in the shape of `target`."""
    return tf.reshape(tf.convert_to_tensor(flat), target.shape)


def restore(flat: np.ndarray, target: Like) -> tf.Tensor:
    """A flat float32[n] in the shape and dtype of `target`."""
    return tf.cast(shaped(flat, target), target.dtype)


def to_host(x: tf.Tensor) -> np.ndarray:
    """x as a read-only NumPy array, sharing memory on the CPU.

    Raises:
        TypeError: x is symbolic, as tensors are while a tf.function is traced.
    """
    if not hasattr(x, "numpy"):
        raise TypeError(
            f"got the symbolic tensor {x.name!r} of a tf.function, expected an eager one; "
            "compress inside tf.numpy_function, or outside of the function"
        )
    return np.asarray(x)


def from_host(values: np.ndarray, device: Any = None) -> tf.Tensor:
    """A host array as a tensor."""
    return tf.convert_to_tensor(values)
