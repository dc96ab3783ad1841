"""What kind of graph is being traced, and which kinds cannot work."""

from __future__ import annotations

import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from ef_horovod.errors import UnsupportedError


def refuse_xla() -> None:
    """Raise while a function with `jit_compile=True` is traced: XLA knows no gather of Horovod.

    Raises:
        UnsupportedError: always there.
    """
    graph = tf.compat.v1.get_default_graph() if not tf.executing_eagerly() else None
    if graph is not None and control_flow_util.GraphOrParentsInXlaContext(graph):
        raise UnsupportedError(
            "got jit_compile=True around an exchange of gradients, expected a function without "
            "it, for XLA has no kernels for Horovod's gather; pass jit_compile=False to "
            "model.compile() or tf.function (Keras' default is True where there is a GPU)"
        )


def refuse_replicas() -> None:
    """Raise inside a `tf.distribute` strategy of several replicas: each rank is one.

    Raises:
        UnsupportedError: always there.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if replicas > 1:
        raise UnsupportedError(
            f"got a tf.distribute strategy of {replicas} replicas, expected none, for every GPU is "
            "a rank of its own with Horovod; start one process for each with horovodrun"
        )
