"""An optimizer of Keras 3 or tf_keras under a new class, whose steps exchange with other ranks.

`ef.DistributedOptimizer` and `ef.CompressedUpdates` differ in their `Averaging`.
"""

from __future__ import annotations

import inspect
from types import new_class
from typing import Any

import keras
import tensorflow as tf

from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.stats import ChannelStats
from ef_horovod.tensorflow.averaging import Averaging
from ef_horovod.tensorflow.checkpoint import StateInKeras
from ef_horovod.tensorflow.engine import Engine
from ef_horovod.tensorflow.server_transport import GraphTransport


class Distributed:
    """Methods that a wrapped optimizer has in addition, in both families."""

    _ef: Averaging
    _ef_own_accumulation: int
    _ef_transport: GraphTransport | None

    def build(self, variables: Any) -> None:
        """As in Keras; makes the error-feedback state too."""
        # Keras' accumulators are unused here, but files need them: a plain optimizer that loads the
        # file has them, and would reject all variables if their number differed.
        _put_accumulation(self, self._ef_own_accumulation)
        super().build(variables)  # type: ignore[misc]
        _put_accumulation(self, 1)
        self._ef_build(variables)

    def get_config(self) -> dict[str, Any]:
        """The plain optimizer's config, so that saved models load without this package."""
        config = super().get_config()  # type: ignore[misc]
        if self._ef_own_accumulation > 1:
            of = config["inner_optimizer"]["config"] if "inner_optimizer" in config else config
            of["gradient_accumulation_steps"] = self._ef_own_accumulation
        return config

    @property
    def transport(self) -> GraphTransport | None:
        """As `ef.Reducer.transport`; known before the optimizer is built if there are servers."""
        reducer = self._ef.reducer
        return reducer.transport if reducer is not None else self._ef_transport

    @property
    def drivers(self) -> list[Engine]:
        """For `ef.TrainingLog`."""
        return self._ef.drivers

    @property
    def outside(self) -> bool:
        """Whether this rank is outside of the process set; then `ef.save` writes nothing."""
        return self._ef.reducer is not None and self._ef.reducer.outside

    @property
    def common_variables(self) -> list[Any]:
        """The optimizer's variables that are equal on all ranks."""
        return self._ef.in_common(self.variables)  # type: ignore[attr-defined]

    def stats(self) -> list[ChannelStats]:
        """As `ef.Reducer.stats`; empty before the first step."""
        return self._ef.stats()

    def compression_state_dict(self) -> dict[str, Any]:
        """As `ef.Reducer.compression_state_dict`; empty before the optimizer is built."""
        return self._ef.state_dict()

    def merged_state_dict(self) -> dict[str, Any]:
        """State of all ranks together, for `ef.save`; collective; the optimizer must be built."""
        self._ef_require_built()
        return self._ef.merged_state_dict()

    def checkpoint(self) -> dict[str, Any]:
        """As `ef.Reducer.checkpoint`, between two steps, such as in a callback of `fit`."""
        reducer = self._ef.reducer
        if reducer is not None:
            return reducer.checkpoint() | self._ef.state_dict()
        if self._ef_transport is not None:
            self._ef_transport.save(0)  # raises: it is too early
        return {}

    def load_compression_state_dict(self, state: dict[str, Any]) -> None:
        """As `ef.Reducer.load_compression_state_dict`; the optimizer must be built."""
        self._ef_require_built()
        self._ef.load_state_dict(state)

    def _ef_require_built(self) -> None:
        if self._ef.reducer is None:
            raise UnsupportedError(
                "got a compression state for an optimizer that is not built, expected a built "
                "one; call optimizer.build(model.trainable_variables) first"
            )

    def _ef_build(self, variables: Any) -> None:
        tracked = self._ef.build(list(variables))
        if tracked is not None:
            self.compression_state = StateInKeras(tracked)  # Keras' files find it here


class _Keras3(Distributed):
    built: bool
    _trainable_variables: list[Any]

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """As in Keras, with averaged gradients."""
        variables = list(
            self._trainable_variables if trainable_variables is None else trainable_variables
        )
        if not self.built:
            self.build(variables)
            self.built = True
        _refuse_inside_loss_scaler(self)
        base = super().apply  # type: ignore[misc]
        self._ef.step(
            list(grads), variables, _loss_scale(self), lambda averages: base(averages, variables)
        )


class _TFKeras(Distributed):
    def apply_gradients(
        self, grads_and_vars: Any, skip_gradients_aggregation: bool = False, **kwargs: Any
    ) -> Any:
        """As in tf_keras, with averaged gradients."""
        base = super().apply_gradients  # type: ignore[misc]
        if skip_gradients_aggregation:  # averaged by `aggregate_gradients` below
            return base(grads_and_vars, skip_gradients_aggregation=True, **kwargs)
        gradients, variables = self._ef_unzip(grads_and_vars)

        def apply(averages: list[Any]) -> None:
            pairs = list(zip(averages, variables, strict=True))
            base(pairs, skip_gradients_aggregation=True, **kwargs)

        self._ef.step(gradients, variables, 1.0, apply)
        return self.iterations  # type: ignore[attr-defined]

    def aggregate_gradients(self, grads_and_vars: Any) -> list[tuple[Any, Any]]:
        """As in tf_keras, which calls it if a loss scaler wraps this optimizer."""
        gradients, variables = self._ef_unzip(grads_and_vars)
        return list(zip(self._ef.average(gradients, variables), variables, strict=True))

    def _ef_unzip(self, grads_and_vars: Any) -> tuple[list[Any], list[Any]]:
        gradients, variables = (list(part) for part in zip(*grads_and_vars, strict=True))
        with tf.init_scope():
            self.build(variables)
        return gradients, variables


def require_plain(optimizer: Any) -> type[Distributed]:
    """The class for a plain optimizer of Keras 3 or tf_keras.

    Raises:
        UnsupportedError: it is wrapped already, or something else.
    """
    if isinstance(optimizer, Distributed) or hasattr(optimizer, "_allreduce_grads"):
        raise UnsupportedError(
            "got an optimizer that is wrapped already, expected a plain Keras optimizer; "
            "wrap it once, by hvd.DistributedOptimizer, ef.DistributedOptimizer or "
            "ef.CompressedUpdates"
        )
    if isinstance(optimizer, keras.optimizers.Optimizer):
        return _Keras3
    if is_optimizer(optimizer):
        return _TFKeras
    raise UnsupportedError(
        f"got an optimizer of type {type(optimizer).__module__}.{type(optimizer).__name__}, "
        "expected one of keras.optimizers or tf_keras.optimizers (not legacy); take one of those, "
        "or ef.DistributedGradientTape, which goes with any optimizer"
    )


def is_optimizer(what: Any) -> bool:
    """Whether it is an optimizer of Keras 3 or tf_keras."""
    if isinstance(what, keras.optimizers.Optimizer):
        return True
    if not _is_from("tf_keras", what):
        return False
    import tf_keras

    return isinstance(what, tf_keras.optimizers.Optimizer)


def _is_from(package: str, optimizer: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == package for kind in type(optimizer).__mro__)


def rebuild(optimizer: Any, *additions: type) -> tuple[Any, int]:
    """The optimizer under a new class; settings and variables are shared with it.

    The class has the base's name and module, so that a saved model names a standard class.

    Args:
        optimizer: a plain one.
        additions: classes with more methods.

    Returns:
        The optimizer, still without an exchange, and Keras' number of accumulated steps, which is
        now 1 there.
    """
    base = type(optimizer)
    members = {"__module__": base.__module__, "__doc__": base.__doc__}
    bases = (*additions, require_plain(optimizer), base)
    wrapped: Any = object.__new__(
        new_class(base.__name__, bases, {}, lambda ns: ns.update(members))
    )
    wrapped.__dict__.update(optimizer.__dict__)
    holder = getattr(wrapped, "inner_optimizer", wrapped)
    steps = getattr(holder, "gradient_accumulation_steps", None) or 1
    _put_accumulation(wrapped, 1)
    return wrapped, int(steps)


def attach(
    averaging: Averaging, wrapped: Any, accumulation: int, transport: GraphTransport | None = None
) -> Any:
    """Give a rebuilt optimizer its exchange; returns it.

    Args:
        averaging: what it does with gradients.
        wrapped, accumulation: the results of `rebuild`.
        transport: to servers, if it is open already.
    """
    wrapped._ef, wrapped._ef_transport = averaging, transport
    wrapped._ef_own_accumulation = accumulation
    if isinstance(wrapped, _Keras3) and wrapped.built:
        wrapped._ef_build(wrapped._trainable_variables)
    return wrapped


def _put_accumulation(wrapped: Any, steps: int) -> None:
    holder = getattr(wrapped, "inner_optimizer", wrapped)
    if hasattr(holder, "gradient_accumulation_steps"):  # tf_keras has none
        holder.gradient_accumulation_steps = steps if steps > 1 else None


def handles_nan(optimizer: Any) -> bool:
    """Whether it checks for NaNs itself, and so must see them: a dynamic loss scaler."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return True
    if not _is_from("tf_keras", optimizer):
        return False
    import tf_keras

    scaler = tf_keras.mixed_precision.LossScaleOptimizer
    return isinstance(optimizer, scaler) and bool(optimizer.dynamic)


def _loss_scale(optimizer: Any) -> Any:
    """The factor that gradients contain."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.dynamic_scale.value
    return optimizer.loss_scale_factor or 1.0


def _refuse_inside_loss_scaler(optimizer: Any) -> None:
    """Raise if the caller is a Keras 3 LossScaleOptimizer: it calls only on ranks without NaN."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.optimizers.LossScaleOptimizer) and caller is not optimizer:
            raise UnsupportedError(
                "got a distributed optimizer inside a LossScaleOptimizer (Keras makes one for the "
                "policy mixed_float16), expected it outside, because a rank with a NaN would leave "
                f"the others waiting; write {optimizer._ef.owner}(keras.optimizers."
                "LossScaleOptimizer(optimizer), ...)"
            )
        frame = frame.f_back
