"""`ef.CompressedUpdates` for Keras 3 and tf_keras: each rank's optimizer makes an update from its
own gradients, in one step or in several, and the updates are averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.tensorflow.averaging import Apply, Averaging, Part
from ef_horovod.tensorflow.engine import Engine
from ef_horovod.tensorflow.options import Options, require_options
from ef_horovod.tensorflow.reducer import Reducer
from ef_horovod.tensorflow.server_transport import GraphTransport
from ef_horovod.tensorflow.sync import question_op
from ef_horovod.tensorflow.update_engine import UpdateEngine
from ef_horovod.tensorflow.variables import native
from ef_horovod.tensorflow.wrapping import attach, handles_nan, rebuild, require_plain
from ef_horovod.training.choice import wants_server
from ef_horovod.training.options import check_options
from ef_horovod.training.policy import DensePolicy, small_or_vector
from ef_horovod.training.updates import QUESTION, SINCE, ask_all, compare_since, refuse_for_updates
from ef_horovod.transports.base import Transport


def CompressedUpdates(
    optimizer: Any,
    compression: Method,
    *,
    dense: DensePolicy = small_or_vector,
    exchange: str = "auto",
    bucket_bytes: int = 25 * 2**20,
    seed: int = 0,
    dense_steps: int = 0,
    local_steps: int = 1,
    process_set: Any = None,
    check_sync: bool = True,
    timeout: float | None = None,
) -> Any:
    """Wrap a Keras optimizer so that its updates are averaged over all ranks, compressed.

    A step runs the optimizer on this rank's own gradients. The change of the variables goes through
    error feedback, and all ranks apply the mean of what was sent. Any optimizer will do: AdamW,
    Muon, Lion, SGD with momentum. Clipping, weight decay, learning rate schedules and Keras'
    `gradient_accumulation_steps` work on this rank's own gradients, as on one rank.

    The result is an instance of the optimizer's class with the same settings and variables, as of
    `ef.DistributedOptimizer`, with the same additional methods. The optimizer's variables, such as
    Adam's moments, differ between ranks, because each rank's gradients do: save and restore them on
    every rank. `ef.TrainingCallback` broadcasts only its numbers, such as `iterations`. Without
    compression it is dense training for SGD, with momentum too; for others it is the mean of the
    ranks' updates, and not the update of the mean gradient.

    If a gradient of any rank has a NaN or an infinity, all ranks leave the step out, and no state
    changes; `stats()[-1].skipped` counts it. The exchange starts after the backward pass and does
    not overlap with it. Memory: a copy of the variables during the step.

    With `local_steps=H`, ranks exchange in every H-th step, and send the change of H steps. Between
    exchanges their variables differ, and the copy stays in memory. `optimizer.exchange()` exchanges
    before it is due: call it before validation, before the model is saved, and at the end.
    `ef.TrainingCallback` does so in `fit`. Variables that are not trained, such as the statistics
    of batch norm, are each rank's own. A NaN or an infinity in a gradient then leaves out the step
    on this rank alone, and a loss scaler lowers its scale there; one in a change drops the
    exchange, and all ranks return to the variables of the last one. `stats()` counts both.

    Args:
        optimizer: of Keras 3 or tf_keras (not its legacy ones), not wrapped. For mixed precision,
            the outermost one: `keras.optimizers.LossScaleOptimizer(optimizer)`.
        compression: error-feedback method with its compressor, such as ErrorFeedback(OneBit()).
        dense: `dense(path, variable)` says which variables' updates stay uncompressed.
        exchange: as in `ef.Reducer`, but no server.
        bucket_bytes: bytes of float32 per compressed bucket.
        seed: of random compressors.
        dense_steps: number of first exchanges that average uncompressed updates.
        local_steps: steps per exchange, equal on all ranks. Schedules of compressors count
            exchanges, those of learning rates steps. With more than 1, all steps are of the same
            variables.
        process_set: Horovod process set to average over; default all ranks.
        check_sync: as in `ef.Reducer`.
        timeout: seconds that a wait for other ranks may take; default $EF_HOROVOD_TIMEOUT or 300.

    Raises:
        UnsupportedError: the combination cannot work; the message names an alternative.
        ValueError: a number is out of range.

    Example:
        optimizer = ef.CompressedUpdates(keras.optimizers.AdamW(1e-3),
                                         compression=ef.ErrorFeedback(ef.OneBit()))
        model.compile(optimizer, loss="mse", jit_compile=False)

    References:
        Karimireddy, Rebjock, Stich, Jaggi: Error Feedback Fixes SignSGD (ICML 2019), Algorithm 2,
        whose compressed quantity is the step. Local steps: Douillard et al.: DiLoCo (2023), with a
        mean as the outer step; Sarfi et al.: SparseLoCo (arXiv 2508.15706, 2025), whose error
        memory decays: `ErrorFeedback(..., decay=0.95)`.
    """
    require_plain(optimizer)
    check_options("CompressedUpdates", **locals())
    options: dict[str, Any] = {
        "dense": dense,
        "exchange": exchange,
        "bucket_bytes": bucket_bytes,
        "seed": seed,
        "dense_steps": dense_steps,
        "process_set": process_set,
        "check_sync": check_sync,
        "timeout": timeout,
    }
    require_options(compression, **options)
    refuse_for_updates(compression)
    if wants_server(exchange):
        raise UnsupportedError(
            f"got exchange={exchange!r} for updates in TensorFlow, expected one between ranks; "
            "leave it out, or take ef.DistributedOptimizer"
        )
    _refuse_averages_of_weights(optimizer)
    wrapped, accumulation = rebuild(optimizer, _Updating)
    updates = Updates(
        lambda variables: _UpdateReducer(variables, compression, local_steps, **options),
        local_steps=local_steps,
        passes=accumulation,
        mean=True,
        handles_nan=handles_nan(wrapped),
    )
    return attach(updates, wrapped, accumulation)


class _Updating:
    """What a Keras optimizer whose updates are averaged can do besides."""

    _ef: Updates

    def exchange(self) -> None:
        """Exchange what changed since the last exchange now, with `local_steps`; collective.

        Call it on all ranks after the same step. All of them have the same variables then. It does
        nothing right after an exchange, and with a single rank.

        Raises:
            UnsupportedError: inside a `tf.function`.
        """
        if not tf.executing_eagerly():
            raise UnsupportedError(
                "got exchange() inside a tf.function, expected it between two steps; call it "
                "outside of the function"
            )
        self._ef.exchange()


class Updates(Averaging):
    """Applies gradients on each rank, and averages what changed; see `training/updates.py`.

    Args:
        make_reducer, options: as of `Averaging`.
        local_steps: steps per exchange.
    """

    owner = "ef.CompressedUpdates"

    def __init__(
        self, make_reducer: Callable[[list[Any]], Reducer], *, local_steps: int, **options: Any
    ) -> None:
        super().__init__(make_reducer, **options)
        self._local_steps = local_steps

    def average(self, gradients: list[Any], variables: list[Any]) -> list[Any]:
        raise UnsupportedError(
            "got ef.CompressedUpdates inside a loss scaler (tf_keras makes one for the policy "
            "mixed_float16), expected the scaler inside, because it steps by the gradients of one "
            "rank; write ef.CompressedUpdates(tf_keras.mixed_precision.LossScaleOptimizer("
            "optimizer), ...)"
        )

    def in_common(self, variables: list[Any]) -> list[Any]:
        return [variable for variable in variables if len(variable.shape) == 0]

    def _take(
        self, part: Part, gradients: list[Any], variables: list[Any], loss_scale: Any, apply: Apply
    ) -> tf.Tensor:
        def alone() -> tf.Tensor:
            apply(gradients)
            return tf.constant(True)

        if not part.reducer.active:
            return alone()

        def left_out() -> tf.Tensor:
            if self._handles_nan:  # a loss scaler lowers its scale
                apply([_spoiled(g, v) for g, v in zip(gradients, variables, strict=True)])
            return tf.constant(False)

        engine, good = _engine_of(part.reducer), _are_finite(gradients)
        if self._local_steps > 1:
            return _local_step(engine, part, variables, good, alone, left_out)

        def together() -> tf.Tensor:
            before = [native(variable).read_value() for variable in variables]
            alone()
            return _average_change(part, variables, before)

        return tf.cond(_ask_all_op(engine, good), together, left_out)

    def exchange(self) -> None:
        """Exchange now, if there were steps since the last exchange; eager and collective."""
        for reducer in self._reducers() if self._local_steps > 1 else ():
            engine = _engine_of(reducer) if reducer.active else None
            if engine is not None and engine.steps_since():
                variables = engine.due()
                part = self._part(variables)
                engine.begin(variables)  # a loaded state may come before the first step
                if engine.steps_since():
                    _exchange(engine, part, variables)

    def _one_set(self) -> str:
        several = self._local_steps > 1
        return f"local_steps={self._local_steps}" if several else super()._one_set()


class _UpdateReducer(Reducer):
    """Its gradients are updates; ranks compare that too."""

    _what = "updates"

    def __init__(
        self, variables: list[Any], compression: Method, local_steps: int, **options: Any
    ) -> None:
        self._local_steps = local_steps
        super().__init__(variables, compression, **options)

    def _make_engine(
        self, named: list[tuple[str, Any]], options: Options, transport: GraphTransport
    ) -> UpdateEngine:
        return UpdateEngine(named, options, transport, self._local_steps)


def _engine_of(reducer: Reducer) -> UpdateEngine:
    (engine,) = reducer.drivers
    assert isinstance(engine, UpdateEngine)
    return engine


def _local_step(
    engine: UpdateEngine,
    part: Part,
    variables: list[Any],
    good: tf.Tensor,
    step: Callable[[], tf.Tensor],
    left_out: Callable[[], tf.Tensor],
) -> tf.Tensor:
    """Ops that take a step on this rank if its gradients are good, and exchange if it is due.

    Returns:
        Whether the step was taken, and not dropped by an exchange.
    """

    def left_out_here() -> tf.Tensor:
        engine.count_left_out_here()
        return left_out()

    engine.begin(variables)
    engine.keep()
    stepped = tf.cond(good, step, left_out_here)
    due = engine.since.assign_add(1) >= engine.local_steps
    kept = tf.cond(due, lambda: _exchange(engine, part, variables), lambda: tf.constant(True))
    return tf.logical_and(stepped, kept)


def _exchange(engine: UpdateEngine, part: Part, variables: list[Any]) -> tf.Tensor:
    """Ops that put the mean of all ranks' changes since the last exchange in their place."""
    with tf.control_dependencies([_compare_since_op(engine)]):
        good = _average_change(part, variables, engine.starts(variables))
    return engine.count_exchange(good)


def _average_change(part: Part, variables: list[Any], before: list[tf.Tensor]) -> tf.Tensor:
    """Ops that put the mean of all ranks' changes in the place of this rank's.

    Args:
        part: the variables' reducer.
        variables: of which this rank has changed some.
        before: their values before, equal on all ranks.

    Returns:
        Whether all ranks' changes were finite; otherwise the variables are as before.
    """
    natives = [native(variable) for variable in variables]
    changes = [_float32(v) - _float32(old) for v, old in zip(natives, before, strict=True)]
    for variable, old in zip(natives, before, strict=True):  # ranks are equal again
        variable.assign(old)
    means, good = part.reduce(changes, 1.0)
    for variable, old, mean in zip(variables, before, means, strict=True):
        new = tf.cast(_float32(old) + mean, old.dtype)
        if variable.constraint is not None:
            new = variable.constraint(new)
        native(variable).assign(tf.where(good, new, old))
    return good


def _ask_all_op(engine: Engine, good: tf.Tensor) -> tf.Tensor:
    """Ops that ask whether all ranks are good; if not, the step counts as left out."""

    def start(bridge: Transport, good: Any) -> Callable[[], bool]:
        wait = ask_all(bridge, bool(good))

        def answer() -> bool:
            all_good = wait()
            if not all_good:
                engine.count_left_out()
            return all_good

        return answer

    return question_op(engine.transport, QUESTION, start, [good], tf.float32)


def _compare_since_op(engine: UpdateEngine) -> tf.Tensor:
    """Ops that raise on all ranks unless all took equally many steps since the last exchange."""

    def start(bridge: Transport, since: Any) -> Callable[[], bool]:
        wait = compare_since(bridge, int(since))

        def compare() -> bool:
            wait()
            return True

        return compare

    return question_op(engine.transport, SINCE, start, [engine.since.read_value()], tf.uint8)


def _refuse_averages_of_weights(optimizer: Any) -> None:
    """Raise for Keras' moving averages, which would be of this rank's steps alone."""
    if getattr(getattr(optimizer, "inner_optimizer", optimizer), "use_ema", False):
        raise UnsupportedError(
            "got an optimizer with use_ema=True for updates, expected one without, because its "
            "averages are of weights before the exchange and differ between ranks; leave it out, "
            "or take ef.DistributedOptimizer"
        )


def _are_finite(gradients: list[Any]) -> tf.Tensor:
    parts = [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients if g is not None]
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(part)) for part in parts])


def _spoiled(gradient: Any, variable: Any) -> Any:
    """NaNs in place of a gradient, if there is one."""
    if gradient is None:
        return None
    return tf.fill(tuple(variable.shape), tf.constant(np.nan, gradient.dtype))


def _float32(value: Any) -> tf.Tensor:
    return tf.cast(value, tf.float32)
