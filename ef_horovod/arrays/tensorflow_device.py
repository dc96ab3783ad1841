"""Helpers of TensorFlow ops: placement, parts of a variable, copies to and from the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import tensorflow as tf

import ef_horovod.arrays.numpy as host


def kernel(on_device: Callable[..., Any]) -> Callable[..., Any]:
    """`on_device` with its ops placed on x's device; TensorFlow would choose one by itself."""

    def run(x: tf.Variable, *args: Any, **kwargs: Any) -> Any:
        with tf.device(x.device):
            return on_device(x, *args, **kwargs)

    run.__name__ = on_device.__name__
    run.__doc__ = getattr(host, on_device.__name__).__doc__
    run.on_device = on_device  # type: ignore[attr-defined]
    return run


def on(device: str | None) -> AbstractContextManager[Any]:
    """Context that places ops on `device`; None keeps the caller's placement."""
    return nullcontext() if device is None else tf.device(device)


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
    with on(device):
        return tf.convert_to_tensor(values)


def parts(x: tf.Variable, step: int) -> Iterator[tuple[int, tf.Tensor]]:
    """(start, float32[at most step]) of the current values of x."""
    # x is read once: each read of a variable with sliced writes copies all of it.
    whole = tf.convert_to_tensor(x)
    for start in range(0, x.shape[0], step):
        yield start, whole[start : start + step]


def put(x: tf.Variable, start: int, values: tf.Tensor) -> None:
    """x[start : start + len(values)] = values; x[...].assign() would read all of x first."""
    tf.raw_ops.ResourceStridedSliceAssign(
        ref=x.handle, begin=[start], end=[start + len(values)], strides=[1], value=values
    )
