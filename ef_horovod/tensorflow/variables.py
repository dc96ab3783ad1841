"""Names and devices of variables, for tf.Variable, Keras 3 and tf_keras."""

from __future__ import annotations

import re
from typing import Any

import tensorflow as tf

from ef_horovod.errors import UnsupportedError
from ef_horovod.training.policy import require_distinct


def native(variable: Any) -> tf.Variable:
    """The tf.Variable behind a Keras 3 variable, or the variable itself."""
    return variable if isinstance(variable, tf.Variable) else variable.value


def is_variable(what: Any) -> bool:
    """Whether it is a tf.Variable or a Keras variable."""
    return isinstance(what, tf.Variable) or isinstance(getattr(what, "value", None), tf.Variable)


def path_of(variable: Any) -> str:
    """Its full name. It contains Keras' layer counters, so it may differ between ranks."""
    return str(getattr(variable, "path", variable.name))


def own_name(variable: Any) -> str:
    """The last part of its name, without Keras' counters, which may differ between ranks.

    Example:
        >>> own_name(tf.Variable(0.0, name="net/dense_3/kernel_1"))
        'kernel'
    """
    last = path_of(variable).rpartition("/")[2].partition(":")[0]
    return re.sub(r"_\d+(?=_|$)", "", last)


def require_variables(variables: Any) -> list[Any]:
    """The argument as a list, if it holds variables.

    Raises:
        UnsupportedError: the argument is a model, a single variable, or something else.
    """
    way_out = "pass a list of them, such as model.trainable_variables"
    if hasattr(type(variables), "trainable_variables"):
        raise UnsupportedError(
            f"got {type(variables).__name__} '{getattr(variables, 'name', '')}', expected its "
            "variables; pass its .trainable_variables"
        )
    if is_variable(variables) or not hasattr(variables, "__iter__"):
        raise UnsupportedError(
            f"got {type(variables).__name__}, expected several variables; {way_out}"
        )
    listed = list(variables)
    for one in listed:
        if not is_variable(one):
            raise UnsupportedError(
                f"got {type(one).__name__} among the variables, expected variables; {way_out}"
            )
    return listed


def name_variables(variables: Any) -> list[tuple[str, Any]]:
    """(name, variable) pairs; a name is the place and `own_name`, equal on all ranks.

    Raises:
        ValueError: there is no variable, or one occurs twice.
        UnsupportedError: one is not a variable, or complex.
    """
    listed = require_variables(variables)
    if not listed:
        raise ValueError(
            "got no variables, expected some to average the gradients of; build the model first, "
            "then pass model.trainable_variables"
        )
    return require_distinct([(f"{i}.{own_name(v)}", v) for i, v in enumerate(listed)])


def require_gradient_of(variable: Any, gradient: Any) -> None:
    """Raise unless a gradient is None, or of the variable's shape and of a floating type.

    Raises:
        ValueError: shape or type is wrong; the message names the variable.
    """
    if gradient is None:
        return
    shape = tf.TensorShape(variable.shape)
    if isinstance(gradient, tf.IndexedSlices):  # any number of rows
        shape, gradient = tf.TensorShape([None, *shape[1:]]), gradient.values
    got = getattr(gradient, "shape", None), getattr(gradient, "dtype", type(gradient).__name__)
    if (
        got[0] is None
        or not shape.is_compatible_with(got[0])
        or not tf.as_dtype(got[1]).is_floating
    ):
        raise ValueError(
            f"got a gradient of shape {got[0]} and type {got[1]} for '{path_of(variable)}', "
            f"expected {shape} of a floating type; pass gradients in the order of the variables"
        )
