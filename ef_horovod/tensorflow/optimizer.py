"""`ef.DistributedOptimizer` for Keras 3 and tf_keras: averages gradients before it applies them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ef_horovod.compressors.identity import Identity
from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.methods.no_feedback import NoFeedback
from ef_horovod.tensorflow.averaging import Averaging
from ef_horovod.tensorflow.options import ReducerOptions, require_options
from ef_horovod.tensorflow.reducer import Reducer, open_servers
from ef_horovod.tensorflow.wrapping import attach, handles_nan, rebuild, require_plain
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
    require_plain(optimizer)
    check_options("DistributedOptimizer", **locals())
    if "discardable" in options:
        raise UnsupportedError(
            "got discardable= for an optimizer, which applies the averages of each step, expected "
            "an ef.Reducer, whose averages you may leave out; see ef.Reducer.discard"
        )
    require_options(compression, **options)
    refuse_momentum(compression, _momenta(optimizer))
    require_plain_sgd(compression, _beyond_sgd(optimizer))
    wrapped, own = rebuild(optimizer)
    if own > 1 and backward_passes_per_step > 1:
        raise UnsupportedError(
            f"got backward_passes_per_step={backward_passes_per_step} beside Keras' "
            f"gradient_accumulation_steps={own}, expected one of them; leave one out"
        )
    if wants_server(options.get("exchange", "auto")):  # now, to refuse a second optimizer at once
        options["transport"] = options.get("transport") or open_servers(options.get("timeout"))

    def reducer_of(variables: list[Any]) -> Reducer:
        reducer = Reducer(variables, compression, **options)
        if reducer.transport is not None and reducer.transport.size > 1:
            inner = getattr(optimizer, "inner_optimizer", optimizer)
            methods = [method for driver in reducer.drivers for method in driver.methods()]
            warn_of_adam(inner, methods, reducer.transport.rank)
        return reducer

    averaging = Averaging(
        reducer_of,
        passes=max(own, backward_passes_per_step),
        mean=own > 1 or average_aggregated_gradients,
        handles_nan=handles_nan(wrapped),
    )
    return attach(averaging, wrapped, own, options.get("transport"))


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
