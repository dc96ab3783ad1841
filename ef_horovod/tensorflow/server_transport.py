"""Transport to parameter servers from inside TensorFlow's graphs, without a communication op.

A channel's two halves run in `tf.numpy_function`s: the first calls `ask`, the second waits for the
answer. Between them the graph passes an empty tensor, so that the second runs later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import tensorflow as tf

from ef_horovod.arrays import Array
from ef_horovod.transports.base import Answer, Measure, Transport
from ef_horovod.transports.horovod_tensorflow import HorovodTensorFlowTransport
from ef_horovod.transports.nodes import Levels

if TYPE_CHECKING:  # it needs MPI
    from ef_horovod.server.client import ServerTransport

T = TypeVar("T")


class ServerBridge(Transport):
    """Replaces `HorovodTensorFlowTransport` and its `GraphBridge` with servers.

    TensorFlow's executor may run several buckets at once. Neither `ServerTransport` nor all of
    MPI's thread levels allow that. So a lock runs one at a time: a start is short, and the waits
    come in the same order on all ranks. Each bucket has a bridge, which counts its bytes.

    Args:
        servers: sends and receives; or one of its levels.
        lock: for `servers`; default a new one.
    """

    def __init__(self, servers: Any, lock: threading.Lock | None = None) -> None:
        super().__init__(servers.rank, servers.size, servers.timeout)
        self._servers: ServerTransport = servers
        self._lock, self.members = lock or threading.Lock(), servers.members

    @property
    def has_server(self) -> bool:
        return True

    def bridge(self) -> ServerBridge:
        """Another bridge, with a separate count of bytes."""
        return ServerBridge(self._servers, self._lock)

    def levels(self) -> Levels | None:
        """Those of the servers' transport, under the same lock."""
        if self._levels is None and (found := self._servers.levels()) is not None:
            node = ServerBridge(found.node, self._lock)
            cross = None if found.cross is None else ServerBridge(found.cross, self._lock)
            self._levels = found._replace(node=node, cross=cross)
        return self._levels

    def handshake(
        self, facts: Sequence[str] = (), step: int = 0, *, several_rounds: bool = False
    ) -> None:
        self._alone(lambda: self._servers.handshake(facts, step, several_rounds=several_rounds))

    def save(self, step: int) -> None:
        self._alone(lambda: self._servers.save(step))

    def close(self, error: str = "") -> None:
        """See `ServerTransport.close`."""
        self._alone(lambda: self._servers.close(error))

    def require_not_begun(self) -> None:
        self._servers.require_not_begun()

    def open_bucket(self, name: str, length: int, method: str, seed: int) -> None:
        self._servers.open_bucket(name, length, method, seed)

    def open_slices(
        self, name: Callable[[int], str], lengths: Sequence[int], method: str, seed: int
    ) -> None:
        self._servers.open_slices(name, lengths, method, seed)

    def ask(self, name: str, payload: np.ndarray, step: int) -> Callable[[], list[Answer]]:
        return self._start(lambda: self._servers.ask(name, payload, step))

    def allgather(
        self, name: str, data: np.ndarray, measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        return self._start(lambda: self._servers.allgather(name, data, measure))

    def alltoall(
        self, name: str, parts: Sequence[np.ndarray], measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        return self._start(lambda: self._servers.alltoall(name, parts, measure))

    def allreduce(self, name: str, values: Array) -> Callable[[], Array]:
        return self._start(lambda: self._servers.allreduce(name, values))

    def dense_nbytes(self, nbytes: int) -> int:
        return self._servers.dense_nbytes(nbytes)

    def collect(self, name: str) -> np.ndarray:
        """Empty, because the message was already sent."""
        return np.empty(0, np.uint8)

    def carry(self, name: str, message: tf.Tensor) -> tf.Tensor:
        """Return the message; no op is needed."""
        return message

    def collect_slices(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Empty, as in `collect`."""
        return np.empty(0, np.uint8), np.empty(0, np.int32)

    def carry_slices(self, name: str, message: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        """Return the message; no op is needed."""
        return message

    def bring(self, name: str, data: np.ndarray) -> None:
        """Do nothing: the answer comes from the servers."""

    def _start(self, start: Callable[[], Callable[[], T]]) -> Callable[[], T]:
        finish = self._alone(start)
        return lambda: self._alone(finish)

    def _alone(self, action: Callable[[], T]) -> T:
        with self._lock:
            sent, received = self._servers.bytes_sent, self._servers.bytes_received
            result = action()
            self.bytes_sent += self._servers.bytes_sent - sent
            self.bytes_received += self._servers.bytes_received - received
            return result


GraphTransport = HorovodTensorFlowTransport | ServerBridge
