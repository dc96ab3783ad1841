"""`ef.DistributedOptimizer` for Keras 3 and tf_keras: averages gradients before it applies them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import new_class
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from ef_horovod.compressors.identity import Identity
from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.stats import ChannelStats
from ef_horovod.methods.base import Method
from ef_horovod.methods.no_feedback import NoFeedback
from ef_horovod.tensorflow.averaging import Averaging
from ef_horovod.tensorflow.checkpoint import StateInKeras
from ef_horovod.tensorflow.engine import Engine
from ef_horovod.tensorflow.options import ReducerOptions, require_options
from ef_horovod.tensorflow.reducer import Reducer, open_servers
from ef_horovod.tensorflow.server_transport import GraphTransport
from ef_horovod.training.choice import wants_server
from ef_horovod.training.momentum import refuse_momentum, require_plain_sgd, warn_of_adam
from ef_horovod.training.options import check_options

if TYPE_CHECKING:
    from typing_extensions import Unpack


def DistributedOptimizer(
    optimizer: Any,
    compression: Method = NoFeedback(Identity()),  # noqa: B008 - frozen
    *,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    **options: Unpack[ReducerOptions],
) -> Any:
    """Wrap a Keras optimizer so that it applies gradients averaged over all ranks, compressed.

    For `keras.optimizers` (Keras 3) and `tf_keras.optimizers`, in `model.fit` and in custom loops,
    eager and inside `tf.function`. The result is an instance of the optimizer's class with the same
    settings and variables. With a single rank it behaves like the plain optimizer, with the
    momentum of `MomentumCorrection` if that is the method. Clipping, weight
    decay and learning rate schedules work on the averages. New are `stats()`,
    `compression_state_dict()`, `load_compression_state_dict()` and `checkpoint()`, which also makes
    servers save their state. `tf.train.Checkpoint` and Keras' files contain the error-feedback
    state. It belongs to a rank, so every rank saves its own.

    If any rank's gradient has a NaN or an infinity, the step is dropped on all ranks: variables,
    error-feedback state and the iteration counter stay unchanged.

    With Keras' `gradient_accumulation_steps`, gradients are exchanged once per that many steps.
    For mixed precision, wrap the outermost optimizer:
    `ef.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer), ...)`.

    Args:
        optimizer: of Keras 3 or tf_keras (not its legacy ones).
        compression: error-feedback method with its compressor, such as EF21(TopK(ratio=0.01)).
        backward_passes_per_step: as in Horovod: number of calls whose gradients are summed before
            they are exchanged and applied.
        average_aggregated_gradients: take their mean, not their sum.
        options: `op`, `dense`, `exchange`, `bucket_bytes`, `seed`, `dense_steps`,
            `sparse_as_dense`, `check_sync`, `process_set`, `timeout`; see `ef.Reducer`.

    Raises:
        UnsupportedError: the combination cannot work; the message names an alternative.
        ValueError: a number is out of range.

    Example:
        optimizer = ef.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9),
                                            compression=ef.EF21(ef.TopK(ratio=0.01)))
        model.compile(optimizer, loss="mse", jit_compile=False)
    """
    family = _family_of(optimizer)
    check_options("DistributedOptimizer", **locals())
    if "discardable" in options:
        raise UnsupportedError(
            "got discardable= for an optimizer, which applies the averages of each step, expected "
            "an ef.Reducer, whose averages you may leave out; see ef.Reducer.discard"
        )
    require_options(compression, **options)
    refuse_momentum(compression, _momenta(optimizer))
    require_plain_sgd(compression, _beyond_sgd(optimizer))
    wrapped = _rebuild(optimizer, family)
    own = _take_accumulation(wrapped)
    if own > 1 and backward_passes_per_step > 1:
        raise UnsupportedError(
            f"got backward_passes_per_step={backward_passes_per_step} beside Keras' "
            f"gradient_accumulation_steps={own}, expected one of them; leave one out"
        )
    if wants_server(options.get("exchange", "auto")):  # now, to refuse a second optimizer at once
        options["transport"] = options.get("transport") or open_servers(options.get("timeout"))
    wrapped._ef_transport = options.get("transport")
    wrapped._ef_own_accumulation = own

    def reducer_of(variables: list[Any]) -> Reducer:
        reducer = Reducer(variables, compression, **options)
        if reducer.transport is not None and reducer.transport.size > 1:
            inner = getattr(optimizer, "inner_optimizer", optimizer)
            methods = [method for driver in reducer.drivers for method in driver.methods()]
            warn_of_adam(inner, methods, reducer.transport.rank)
        return reducer

    wrapped._ef = Averaging(
        reducer_of,
        passes=max(own, backward_passes_per_step),
        mean=own > 1 or average_aggregated_gradients,
        handles_nan=_is_loss_scaler(wrapped),
    )
    if family is _Keras3 and wrapped.built:
        wrapped._ef_build(wrapped._trainable_variables)
    return wrapped


class _Distributed:
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

    def stats(self) -> list[ChannelStats]:
        """As `ef.Reducer.stats`; empty before the first step."""
        return self._ef.stats()

    def compression_state_dict(self) -> dict[str, Any]:
        """As `ef.Reducer.compression_state_dict`; empty before the optimizer is built."""
        return self._ef.state_dict()

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
        if self._ef.reducer is None:
            raise UnsupportedError(
                "got a compression state for an optimizer that is not built, expected a built "
                "one; call optimizer.build(model.trainable_variables) first"
            )
        self._ef.load_state_dict(state)

    def _ef_build(self, variables: Any) -> None:
        tracked = self._ef.build(list(variables))
        if tracked is not None:
            self.compression_state = StateInKeras(tracked)  # Keras' files find it here


class _Keras3(_Distributed):
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


class _TFKeras(_Distributed):
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


def _family_of(optimizer: Any) -> type[_Distributed]:
    if isinstance(optimizer, _Distributed) or hasattr(optimizer, "_allreduce_grads"):
        raise UnsupportedError(
            "got an optimizer that is wrapped already, expected a plain Keras optimizer; "
            "wrap it once, by hvd.DistributedOptimizer or by ef.DistributedOptimizer"
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


def _momenta(optimizer: Any) -> Iterator[tuple[str, Any]]:
    holder = getattr(optimizer, "inner_optimizer", optimizer)
    for option in ("momentum", "beta_1"):
        yield option, getattr(holder, option, None)


def _beyond_sgd(optimizer: Any) -> str:
    """What the optimizer is or has beyond plain SGD, or ""."""
    holder = getattr(optimizer, "inner_optimizer", optimizer)
    if not any(kind.__name__ == "SGD" for kind in type(holder).__mro__):
        return f"the rule of {type(holder).__name__}"
    options = ("momentum", "clipnorm", "clipvalue", "global_clipnorm", "use_ema")
    found = [(name, getattr(holder, name, None)) for name in options]
    return next((f"{name}={value}" for name, value in found if value), "")


def _is_from(package: str, optimizer: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == package for kind in type(optimizer).__mro__)


def _rebuild(optimizer: Any, family: type[_Distributed]) -> Any:
    """The optimizer under a new class; settings and variables are shared with it.

    The class has the base's name and module, so that a saved model names a standard class.
    """
    base = type(optimizer)
    members = {"__module__": base.__module__, "__doc__": base.__doc__}
    wrapped: Any = object.__new__(
        new_class(base.__name__, (family, base), {}, lambda ns: ns.update(members))
    )
    wrapped.__dict__.update(optimizer.__dict__)
    return wrapped


def _take_accumulation(wrapped: Any) -> int:
    """Keras' number of accumulated steps; sets Keras' to 1, so that only we accumulate."""
    holder = getattr(wrapped, "inner_optimizer", wrapped)
    steps = getattr(holder, "gradient_accumulation_steps", None) or 1
    _put_accumulation(wrapped, 1)
    return int(steps)


def _put_accumulation(wrapped: Any, steps: int) -> None:
    holder = getattr(wrapped, "inner_optimizer", wrapped)
    if hasattr(holder, "gradient_accumulation_steps"):  # tf_keras has none
        holder.gradient_accumulation_steps = steps if steps > 1 else None


def _is_loss_scaler(optimizer: Any) -> bool:
    """Whether it checks for NaNs itself, and so must see them."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return True
    if not _is_from("tf_keras", optimizer):
        return False
    import tf_keras

    return isinstance(optimizer, tf_keras.mixed_precision.LossScaleOptimizer)


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
                "the others waiting; write ef.DistributedOptimizer(keras.optimizers."
                "LossScaleOptimizer(optimizer), ...)"
            )
        frame = frame.f_back
