"""Compares all ranks' parameters by hash, so that no rank diverges unnoticed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from ef_horovod.errors import UnsupportedError
from ef_horovod.tensorflow.graphs import python_op
from ef_horovod.tensorflow.server_transport import GraphTransport
from ef_horovod.tensorflow.variables import native, require_variables
from ef_horovod.training.in_sync import digest_of, require_equal
from ef_horovod.transports.base import Transport
from ef_horovod.transports.horovod_tensorflow import HorovodTensorFlowTransport


def require_in_sync(variables: Iterable[Any], timeout: float | None = None) -> None:
    """Raise on all ranks unless the variables are bitwise equal on all of them; collective.

    `ef.DistributedOptimizer`, `ef.Reducer` and `ef.TrainingCallback` call it after the first step.

    Args:
        variables: in the same order on all ranks, such as model.variables.
        timeout: seconds to wait for other ranks; default $EF_HOROVOD_TIMEOUT or 300.

    Raises:
        OutOfSyncError: variables differ; the message names two ranks and likely reasons.
        UnsupportedError: Horovod is not initialised, as in a job with parameter servers.

    Example:
        ef.require_in_sync(model.trainable_variables)
    """
    require_horovod("ef.require_in_sync")
    listed = require_variables(variables)
    transport = HorovodTensorFlowTransport("ef.sync", timeout=timeout)
    if transport.size > 1:
        digest = digest_of([np.asarray(native(v).read_value()) for v in listed])
        _require_equal(transport.allgather("digest", digest)())


def require_horovod(what: str) -> None:
    """Raise unless `hvd.init()` was called; a job with parameter servers does not call it."""
    if not hvd.is_initialized():
        raise UnsupportedError(
            f"got {what} without an initialised Horovod, expected hvd.init() before it; in a job "
            "with parameter servers leave it out and give all workers the same first values, by "
            "keras.utils.set_random_seed(seed) or a file: they are compared after the first step"
        )


def in_sync_op(variables: Sequence[tf.Variable], transport: GraphTransport) -> tf.Tensor:
    """`require_in_sync` as a graph op; the executor runs its Python parts."""

    def start(bridge: Transport, *values: np.ndarray) -> Callable[[], bool]:
        gathered = bridge.allgather("sync", digest_of(values))

        def compare() -> bool:
            _require_equal(gathered())
            return True

        return compare

    return question_op(transport, "sync", start, list(variables), tf.uint8)


def question_op(
    transport: GraphTransport,
    name: str,
    start: Callable[..., Callable[[], bool]],
    inputs: list[Any],
    kind: tf.DType,
) -> tf.Tensor:
    """A collective in a graph whose result is a bool, equal on all ranks; the op returns it.

    Args:
        transport: its op carries the data.
        name: of the collective.
        start: gets a transport and the inputs' values; starts the collective of this name and
            returns a function that waits for its result.
        inputs: tensors or variables.
        kind: tf.uint8 for an allgather, tf.float32 for an allreduce.
    """
    bridge = transport.bridge()
    finish: list[Callable[[], bool]] = []

    def leave(*values: np.ndarray) -> np.ndarray:
        finish.append(start(bridge, *values))
        return bridge.collect(name)

    def arrive(data: np.ndarray) -> np.bool_:
        bridge.bring(name, data)
        return np.bool_(finish.pop()())

    message = tf.ensure_shape(python_op(leave, inputs, kind), [None])
    return tf.ensure_shape(python_op(arrive, [transport.carry(name, message)], tf.bool), [])


def _require_equal(digests: Sequence[np.ndarray]) -> None:
    require_equal(
        digests,
        "check that the optimizer or the tape is wrapped "
        "(ef.DistributedOptimizer, ef.DistributedGradientTape) and that the first values were "
        "broadcast (ef.TrainingCallback or ef.broadcast_variables), or with "
        "parameter servers come from one seed; between local steps call optimizer.exchange() first",
    )
