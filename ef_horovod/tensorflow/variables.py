"""What a variable is called and where it lies, for tf.Variable, Keras 3 and tf_keras alike."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from ef_horovod.policy import require_distinct


def native(variable: Any) -> tf.Variable:
    """The tf.Variable behind a Keras 3 variable, or the variable itself."""
    return variable if isinstance(variable, tf.Variable) else variable.value


def path_of(variable: Any) -> str:
    """Its full name; Keras counts layers in it, so it may differ between ranks."""
    return str(getattr(variable, "path", variable.name))


def name_variables(variables: list[Any]) -> list[tuple[str, Any]]:
    """(name, variable): place and last part of the path, which are equal on all ranks.

    Raises:
        ValueError: no variable at all, or one that occurs twice.
        UnsupportedError: one is no variable, or complex.
    """
    if not variables:
        raise ValueError(
            "got no variables, expected some to average the gradients of; build the model first, "
            "then pass model.trainable_variables"
        )
    named = [
        (f"{i}.{path_of(v).rpartition('/')[2].partition(':')[0]}", v)
        for i, v in enumerate(variables)
    ]
    return require_distinct(named)


def on_gpu(variable: Any) -> bool:
    """Whether a variable's memory is a GPU's."""
    return "GPU" in native(variable).device.upper()
