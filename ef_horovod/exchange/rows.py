"""Exchange of one embedding's sparse gradient: only the touched rows are sent."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ef_horovod.compressors.identity import Identity
from ef_horovod.errors import PayloadError, UnsupportedError
from ef_horovod.exchange.channel import Channel, Piece
from ef_horovod.exchange.registry import EXCHANGES
from ef_horovod.methods.no_feedback import NoFeedback
from ef_horovod.transports.base import Transport
from ef_horovod.wire import MAX_NBYTES, size_class

_COUNT = np.dtype("<i8")  # number of rows; first in a message
_INDEX, _VALUE = np.dtype("<i8"), np.dtype("<f4")


class Rows(NamedTuple):
    """Rows of a matrix."""

    indices: np.ndarray  # int64[k]
    values: np.ndarray  # float32[k, width]

    def coalesced(self) -> Rows:
        """The same sum with each row once, in ascending order; duplicates are added in order."""
        from ef_horovod.arrays.kernels_rows import add_rows

        indices, places = np.unique(self.indices, return_inverse=True)
        values = np.zeros((indices.size, self.values.shape[1]), np.float32)
        add_rows(values, places, np.ascontiguousarray(self.values))
        return Rows(indices, values)


class RowsChannel(Channel):
    """Exchange of one parameter's rows: uncompressed, each row once per rank.

    It has the steps of a `Channel`, so that buckets and rows are committed together or not at all.
    There is no error-feedback state, because nothing is lost.

    Args:
        name: of the parameter; equal on all ranks.
        height: number of rows of the parameter, seen as a matrix.
        width: length of a row.
        transport: to the other ranks.
    """

    def __init__(self, name: str, height: int, width: int, transport: Transport) -> None:
        nothing = np.zeros(0, np.float32)
        method = NoFeedback(Identity())
        super().__init__(f"rows.{name}", nothing, method, transport, EXCHANGES["gather"])
        self._height, self.width = height, width
        self._stats.num_elements, self._stats.method = height * width, "rows as they are"
        self.rows = Rows(np.zeros(0, np.int64), np.zeros((0, width), np.float32))
        """Rows for `start` to send: the caller sets them per step; rows may occur repeatedly."""

    def _open(self, seed: int) -> tuple[Any, Any]:
        return None, None

    def pieces(self) -> list[Piece]:
        return []

    def start(self, step: int) -> None:
        """Send `rows`, each row once."""
        self._begin()
        with self._timed("seconds_compress"):
            message = self._packed(self.rows.coalesced())
        with self._counted():
            self._finish = self._transport.allgather(self.name, message, self._nbytes)

    def arrived(self) -> bool:
        """Wait for all ranks' rows; whether their sum is finite."""
        messages = self._wait()
        with self._timed("seconds_decompress"):
            parts = [self._unpacked(message) for message in messages]
            # In rank order, so that all ranks get the same bits.
            indices, values = (np.concatenate(of_all) for of_all in zip(*parts, strict=True))
            self._received = Rows(indices, values).coalesced()
        return bool(np.isfinite(self._received.values).all())

    def commit(self) -> Rows:
        """The mean over ranks, each row once, in ascending order."""
        total, self._received = self._received, None
        np.divide(total.values, np.float32(self._transport.size), out=total.values)
        self._stats.steps += 1
        return total

    def squared_norms(self) -> tuple[float, float] | None:
        return None

    def _packed(self, rows: Rows) -> np.ndarray:
        """int64 k, int64[k] indices, float32[k, width] values, zeros up to the size class."""
        count = rows.indices.size
        message = np.zeros(size_class(self._exact_nbytes(count)), np.uint8)
        if message.size * self._transport.size > MAX_NBYTES:
            raise UnsupportedError(
                f"got {count} rows of {self.width} numbers in a gradient for '{self.name}', "
                f"expected at most {MAX_NBYTES // self._transport.size} bytes per rank; take "
                "smaller batches, or pass sparse_as_dense=True"
            )
        message[: _COUNT.itemsize].view(_COUNT)[0] = count
        indices, values = self._parts(message, count)
        indices[:], values[:] = rows.indices, rows.values
        return message

    def _unpacked(self, message: np.ndarray) -> Rows:
        message = np.ascontiguousarray(message)
        if message.ctypes.data % _COUNT.itemsize:
            message = message.copy()
        rows = Rows(*self._parts(message, self._count(message)))
        if rows.indices.size and not 0 <= rows.indices.min() <= rows.indices.max() < self._height:
            raise PayloadError(
                f"a rank sent row {rows.indices.max()} in '{self.name}', expected rows from 0 to "
                f"{self._height - 1}; use the same model on all ranks"
            )
        return rows

    def _parts(self, message: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Views of the indices and the values in a message."""
        middle, end = _COUNT.itemsize + count * _INDEX.itemsize, self._exact_nbytes(count)
        indices = message[_COUNT.itemsize : middle].view(_INDEX)
        return indices, message[middle:end].view(_VALUE).reshape(count, self.width)

    def _nbytes(self, data: np.ndarray) -> int:
        """Length in bytes of the message at the start of `data`; see `Transport.allgather`."""
        return size_class(self._exact_nbytes(self._count(data)))

    def _count(self, data: np.ndarray) -> int:
        count = int(np.frombuffer(data[: _COUNT.itemsize].tobytes(), _COUNT)[0])
        if not 0 <= count <= min(self._height, data.size):
            raise PayloadError(
                f"a rank sent {count} rows in {data.size} bytes of '{self.name}', expected at most "
                f"{self._height}; use the same model on all ranks"
            )
        return count

    def _exact_nbytes(self, count: int) -> int:
        return _COUNT.itemsize + count * (_INDEX.itemsize + _VALUE.itemsize * self.width)


def matrix_of(shape: tuple[int, ...], sparse_dims: int = 1) -> tuple[int, int]:
    """Height and width of a parameter whose first dimensions count rows."""
    return math.prod(shape[:sparse_dims]), math.prod(shape[sparse_dims:])
