"""Low-rank products for TensorFlow; see `arrays/torch_matrices.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from ef_horovod.arrays.matrices import Matrix, each_factor
from ef_horovod.arrays.numpy_matrices import __all__ as __all__
from ef_horovod.arrays.tensorflow_device import kernel, put, to_host

_WORK = 1 << 22  # entries handled at once where an op needs temporaries


@kernel
def factors(
    x: tf.Variable, matrices: Sequence[Matrix], bases: np.ndarray, *, left: bool
) -> np.ndarray:
    whole = tf.convert_to_tensor(x)
    made = [whole[:0]]
    for matrix, basis in each_factor(matrices, bases, left=not left):
        product = tf.matmul(basis, _view(whole, matrix), transpose_b=left)
        made.append(tf.reshape(product, [-1]))
    return to_host(tf.concat(made, 0))


@kernel
def add_products(
    x: tf.Variable,
    matrices: Sequence[Matrix],
    lefts: np.ndarray,
    rights: np.ndarray,
    weight: float,
) -> None:
    whole = tf.convert_to_tensor(x)
    own = each_factor(matrices, lefts, left=True)
    other = each_factor(matrices, rights, left=False)
    for (matrix, left), (_, right) in zip(own, other, strict=True):
        step, rows = max(1, _WORK // matrix.columns), _view(whole, matrix)
        for start in range(0, matrix.rows, step):
            part = rows[start : start + step]
            share = left[:, start : start + step] * np.float32(weight)
            for j in range(matrix.rank):
                part += tf.convert_to_tensor(share[j, :, None]) * right[j]
            put(x, matrix.start + start * matrix.columns, tf.reshape(part, [-1]))


def _view(x: tf.Tensor, matrix: Matrix) -> tf.Tensor:
    return tf.reshape(x[matrix.start : matrix.stop], [matrix.rows, matrix.columns])
