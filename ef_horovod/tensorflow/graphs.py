"""Python ops in graphs, and checks that reject unsupported kinds of graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from ef_horovod.errors import EFHorovodError, UnsupportedError
from ef_horovod.transports.timeouts import last_words


def python_op(
    function: Callable[..., Any], inputs: list[Any], kinds: Any, *, stateful: bool = True
) -> Any:
    """An op that runs a function when its inputs exist; see `tf.numpy_function`.

    TensorFlow wraps an error of this library into one of its errors. The original message is then
    repeated at the end of the output.

    Args:
        function: gets NumPy arrays; TensorFlow copies what is on a GPU.
        inputs: tensors.
        kinds: dtype of the result, or of each result.
        stateful: False for ops without automatic control dependencies.
    """

    @functools.wraps(function)
    def run(*values: Any) -> Any:
        try:
            return function(*values)
        except EFHorovodError as error:
            last_words.remember(str(error))
            raise

    with tf.device("/CPU:0"):
        return tf.numpy_function(run, inputs, kinds, stateful=stateful)


class WholeSteps:
    """Rejects a step if the previous one began but did not end, because it failed in between.

    Args:
        name: used in the error message.
    """

    def __init__(self, name: str) -> None:
        self._name, self._begun = name, False

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Marks a step as begun if the body succeeds; until then nothing was sent.

        Raises:
            UnsupportedError: the previous step has not ended.
        """
        if self._begun:
            raise UnsupportedError(
                f"got a step of '{self._name}' after one that failed half-way, expected the job to "
                "end with that: other ranks may have counted its messages; restart from a "
                "checkpoint, and keep checks that can fail out of the function that averages "
                "gradients"
            )
        yield
        self._begun = True

    def end(self) -> None:
        """Mark the step as ended: it succeeded, or was dropped on all ranks."""
        self._begun = False


def refuse_xla() -> None:
    """Raise while a function with `jit_compile=True` is traced: XLA lacks Horovod's gather.

    Raises:
        UnsupportedError: such a function is being traced.
    """
    graph = tf.compat.v1.get_default_graph() if not tf.executing_eagerly() else None
    if graph is not None and control_flow_util.GraphOrParentsInXlaContext(graph):
        raise UnsupportedError(
            "got jit_compile=True around an exchange of gradients, expected a function without "
            "it, because XLA has no kernels for Horovod's gather; pass jit_compile=False to "
            "model.compile() or tf.function (Keras' default is True where there is a GPU)"
        )


def refuse_replicas() -> None:
    """Raise inside a `tf.distribute` strategy of several replicas: each rank is one replica.

    Raises:
        UnsupportedError: the current strategy has several replicas.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if replicas > 1:
        raise UnsupportedError(
            f"got a tf.distribute strategy of {replicas} replicas, expected none, because every "
            "GPU is a separate rank in Horovod; start one process for each with horovodrun"
        )
