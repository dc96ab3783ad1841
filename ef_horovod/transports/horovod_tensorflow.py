"""Transport over horovod.tensorflow: named ops, in eager mode or inside a graph.

Horovod's TensorFlow ops have no handles to poll. In a graph the executor starts each op as soon as
its input exists. The code around the op runs in `tf.numpy_function`s. So a collective in a graph
has three parts:

1. A channel starts it on a `GraphBridge`, which hands the message to the graph.
2. `carry` is the op.
3. The bridge gives the received data to the function in which the channel waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from ef_horovod.arrays import Array
from ef_horovod.errors import CollectiveTimeoutError
from ef_horovod.transports.base import Measure, Transport, require_summable, split
from ef_horovod.transports.horovod import HorovodTransport
from ef_horovod.transports.nodes import Levels
from ef_horovod.transports.timeouts.alarm import Alarm
from ef_horovod.transports.timeouts.calls import calls_under_way
from ef_horovod.transports.timeouts.ending import refuse_join, watch_over

refuse_join("horovod.tensorflow", "horovod.tensorflow.mpi_ops")
_shutting_down = threading.Lock()  # never released


def open_lasting(
    prefix: str, process_set: Any, timeout: float | None
) -> HorovodTensorFlowTransport:
    """A transport for a whole training; `hvd.join()` is refused while it exists."""
    transport = HorovodTensorFlowTransport(prefix, process_set, timeout)
    watch_over(transport, _shut_down_once)
    return transport


def _shut_down_once() -> None:
    """Shut Horovod down once; only the first transport's alarm does it."""
    if _shutting_down.acquire(blocking=False):
        hvd.shutdown()


class HorovodTensorFlowTransport(HorovodTransport):
    """The ranks of a Horovod process set; each collective blocks when it is started."""

    _hvd = hvd

    def __init__(
        self, prefix: str = "ef", process_set: Any = None, timeout: float | None = None
    ) -> None:
        super().__init__(prefix, process_set, timeout)
        self.alarm = Alarm(self.timeout, self._waited, _shut_down_once)

    def allgather(
        self, name: str, data: np.ndarray, measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        self.require_countable(name, data.size)
        gathered = self._at_once(name, lambda: self.carry(name, tf.convert_to_tensor(data)))
        parts = split(name, gathered, data.size, self.size, measure)
        self._count_allgather([part.size for part in parts])
        return lambda: parts

    def alltoall(
        self, name: str, parts: Sequence[np.ndarray], measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        message, lengths = np.concatenate(parts), _lengths(parts)
        arrived = self._at_once(name, lambda: self.carry_slices(name, message, lengths))
        received = split(name, arrived, parts[self.rank].size, self.size, measure)
        self._count_alltoall(parts, received)
        return lambda: received

    def allreduce(self, name: str, values: Array) -> Callable[[], Array]:
        require_summable(values)
        total = self._at_once(name, lambda: self.carry(name, tf.convert_to_tensor(values)))
        self._count_allreduce(total.nbytes)
        return lambda: total

    def broadcast(self, name: str, data: np.ndarray, root_rank: int) -> np.ndarray:
        """Send one rank's uint8[m] to all ranks; m >= 1 is equal on all of them."""

        def op() -> tf.Tensor:
            return hvd.broadcast(
                data,
                root_rank,
                name=self.named(name),
                ignore_name_scope=True,
                process_set=self._process_set,
            )

        return self._at_once(name, op)

    def carry(self, name: str, message: tf.Tensor) -> tf.Tensor:
        """The op: gathers uint8[m] from all ranks into uint8[n * m], or sums floats over ranks."""
        with tf.device("/CPU:0"):
            if message.dtype == tf.uint8:
                return hvd.allgather(
                    message,
                    name=self.named(name),
                    ignore_name_scope=True,
                    process_set=self._process_set,
                )
            return hvd.allreduce(
                message,
                op=hvd.Sum,
                name=self.named(name),
                ignore_name_scope=True,
                process_set=self._process_set,
            )

    def carry_slices(self, name: str, message: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        """The op: cuts uint8[m] by int32[n] lengths, one part per rank; returns received bytes."""
        with tf.device("/CPU:0"):
            arrived, _ = hvd.alltoall(
                message,
                splits=lengths,
                name=self.named(name),
                ignore_name_scope=True,
                process_set=self._process_set,
            )
            return arrived

    def bridge(self) -> GraphBridge:
        """The transport for a channel inside a graph."""
        return GraphBridge(self)

    def _at_once(self, name: str, op: Callable[[], tf.Tensor]) -> np.ndarray:
        self.alarm.start(name)
        try:
            with tf.init_scope():  # out of the graph, if one is being traced
                return np.array(op())
        except tf.errors.OpError as error:
            if self.alarm.rung:
                raise CollectiveTimeoutError(self.alarm.rung) from error
            raise
        finally:
            self.alarm.stop(name)

    def _waited(self, names: list[str]) -> str:
        return (
            f"{self.who} waited {self.timeout:g} s in "
            f"'{self.named(names[0])}' for at least one other rank (Horovod's stall warning on "
            "rank 0 names it), and ends the job; see why it did not get there (it failed, has "
            "fewer batches, or called hvd.join(), which cannot go with compression), or raise "
            "timeout= or EF_HOROVOD_TIMEOUT"
        )


class GraphBridge(Transport):
    """Moves a channel's messages to the ops of a graph and back, inside numpy_functions.

    Args:
        transport: its ops carry the messages.
    """

    fixed_collectives = True

    def __init__(self, transport: HorovodTensorFlowTransport) -> None:
        super().__init__(transport.rank, transport.size, transport.timeout)
        self._transport = transport
        self.members = transport.members
        self._levels: Levels | None = None
        self._leaving: dict[str, np.ndarray] = {}
        self._lengths: dict[str, np.ndarray] = {}
        self._arrived: dict[str, np.ndarray] = {}

    def allgather(
        self, name: str, data: np.ndarray, measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        self._transport.require_countable(name, data.size)
        self._leave(name, data)

        def finish() -> list[np.ndarray]:
            parts = split(name, self._arrived.pop(name), data.size, self.size, measure)
            self._count_allgather([part.size for part in parts])
            return parts

        return finish

    def alltoall(
        self, name: str, parts: Sequence[np.ndarray], measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        self._lengths[name] = _lengths(parts)
        self._leave(name, np.concatenate(parts))

        def finish() -> list[np.ndarray]:
            own = parts[self.rank].size
            received = split(name, self._arrived.pop(name), own, self.size, measure)
            self._count_alltoall(parts, received)
            return received

        return finish

    def allreduce(self, name: str, values: Array) -> Callable[[], Array]:
        require_summable(values)
        self._leave(name, values)
        self._count_allreduce(values.nbytes)
        # A view, because a graph whose collectives change carries floats as bytes.
        return lambda: self._arrived.pop(name).view(values.dtype)

    @property
    def ranks_per_node(self) -> int:
        return self._transport.ranks_per_node

    def levels(self) -> Levels | None:
        levels = self._transport.levels()
        if levels is not None and self._levels is None:
            node, cross = levels.node, levels.cross
            assert isinstance(node, HorovodTensorFlowTransport)
            assert cross is None or isinstance(cross, HorovodTensorFlowTransport)
            beyond = None if cross is None else cross.bridge()
            self._levels = levels._replace(node=node.bridge(), cross=beyond)
        return self._levels

    def collect(self, name: str) -> np.ndarray:
        """The message to carry: uint8[m] to gather or floats to sum."""
        return self._leaving.pop(name)

    def collect_slices(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The same for `carry_slices`: uint8[m] and the lengths of its parts, int32[n]."""
        return self._leaving.pop(name), self._lengths.pop(name)

    def bring(self, name: str, data: np.ndarray) -> None:
        """Take over the received data."""
        self._transport.alarm.stop(name)
        self._arrived[name] = data

    def _leave(self, name: str, data: np.ndarray) -> None:
        self._transport.alarm.start(name, calls_under_way())
        self._leaving[name] = data


def _lengths(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([part.size for part in parts], np.int32)
