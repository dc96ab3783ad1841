"""The body of sparse payloads: some entries as they are, with their places."""

from __future__ import annotations

import struct

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.errors import PayloadError
from ef_horovod.index_code import decode_indices, encode_indices, indices_nbytes
from ef_horovod.wire import Fields

_LAYOUT = struct.Struct("<I")  # k


def body_nbytes(k: int, d: int) -> int:
    """Exact size of a body with k of d entries."""
    return _LAYOUT.size + indices_nbytes(k, d) + 4 * k


def encode(
    x: Array, indices: np.ndarray, values: np.ndarray, *, residual: bool
) -> tuple[np.ndarray, ...]:
    """uint32 k, the code of the ascending indices, k float32 values.

    With `residual`, x becomes zero where it is sent.
    """
    if residual:
        namespace(x).scatter_put(x, indices, np.zeros_like(values))
    head = np.frombuffer(_LAYOUT.pack(indices.size), np.uint8)
    return head, encode_indices(indices, x.shape[0]), values.astype("<f4", copy=False)


def accumulate(body: np.ndarray, dense: Array, weight: float, what: str) -> None:
    """dense += weight * the entries; `what` is the compressor's name.

    Raises:
        PayloadError: the body is malformed; dense is untouched then.
    """
    d = dense.shape[0]
    fields = Fields(body, what)
    (k,) = fields.unpack(_LAYOUT)
    if k > d:
        raise PayloadError(
            f"{what} payload has {k} entries, expected at most {d}; it was damaged on the way"
        )
    code = fields.array("u1", indices_nbytes(k, d))
    values = fields.array("<f4", k)
    fields.end()
    namespace(dense).scatter_add(dense, decode_indices(code, k, d), values, weight)
