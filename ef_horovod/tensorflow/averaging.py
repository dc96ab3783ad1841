"""What a wrapped optimizer does first: gradients are added up, averaged, and applied if good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from ef_horovod.errors import UnsupportedError
from ef_horovod.tensorflow.checkpoint import Memories
from ef_horovod.tensorflow.reducer import Reducer

Apply = Callable[[list[Any]], None]
Step = Callable[[list[Any]], tf.Tensor]  # averages and applies gradients; whether it was good


class Averaging(tf.Module):
    """The reducer of an optimizer, and what comes between a call and a step.

    Args:
        make_reducer: from variables.
        passes: calls that make a step.
        mean: whether a step gets the mean or the sum of its passes' gradients.
        handles_nan: whether the optimizer itself leaves out steps with NaNs.
    """

    def __init__(
        self,
        make_reducer: Callable[[list[Any]], Reducer],
        *,
        passes: int,
        mean: bool,
        handles_nan: bool,
    ) -> None:
        super().__init__(name="ef_averaging")
        self._make_reducer, self._handles_nan = make_reducer, handles_nan
        self.accumulation = Accumulation(passes, mean)
        self.reducer: Reducer | None = None
        self._variables: tuple[int, ...] = ()

    def build(self, variables: list[Any]) -> Memories | None:
        """Make the reducer at the first call; its memories then, if it has some.

        Raises:
            UnsupportedError: other variables than at the first call.
        """
        ids = tuple(id(v) for v in variables)
        if self.reducer is None:
            self.reducer = self._make_reducer(variables)
            self._variables = ids
            return self.reducer.memories
        if ids != self._variables:
            raise UnsupportedError(
                f"got gradients of {len(ids)} variables, expected those of the first call "
                f"({len(self._variables)}), in the same order; wrap an optimizer of its own for "
                "each set of variables that is trained"
            )
        return None

    def average(self, gradients: list[Any]) -> list[Any]:
        """Ops that average gradients; NaN if the step is not good."""
        if self.accumulation.passes > 1:
            raise UnsupportedError(
                "got accumulated gradients inside a loss scaler, expected the scaler inside; write "
                "ef.DistributedOptimizer(tf_keras.mixed_precision.LossScaleOptimizer(optimizer))"
            )
        assert self.reducer is not None
        return self.reducer.reduce(gradients)

    def step(self, gradients: list[Any], loss_scale: Any, apply: Apply) -> None:
        """Ops that average the gradients and apply them, if the step is good."""
        reducer = self.reducer
        assert reducer is not None

        def average_and_apply(gradients: list[Any]) -> tf.Tensor:
            averages, good = reducer.reduce_scaled(gradients, loss_scale)
            if self._handles_nan or not reducer.active:
                apply(averages)
                return good

            def applied() -> tf.Tensor:
                apply(averages)
                return tf.constant(True)

            return tf.cond(good, applied, lambda: tf.constant(False))

        self.accumulation.run(gradients, average_and_apply)


class Accumulation(tf.Module):
    """Calls a step once in `passes` calls, with the sum or mean of the gradients so far.

    Args:
        passes: calls that make a step.
        mean: whether the step gets means, or sums.
    """

    def __init__(self, passes: int, mean: bool) -> None:
        super().__init__(name="ef_accumulation")
        self.passes, self._mean = passes, mean
        self.sums: list[tf.Variable] = []
        with tf.init_scope():
            self.count = tf.Variable(0, trainable=False, dtype=tf.int64)

    def run(self, gradients: list[Any], step: Step) -> tf.Tensor:
        """Ops that add the gradients, and at the last pass take the step.

        Args:
            gradients: tensors, `tf.IndexedSlices` (which become dense) or None.
            step: gets gradients in the same order.

        Returns:
            Whether the step was good; True for a pass without one.
        """
        if self.passes == 1:
            return step(gradients)
        here = [i for i, gradient in enumerate(gradients) if gradient is not None]
        dense = [tf.convert_to_tensor(gradients[i]) for i in here]
        if not self.sums:
            with tf.init_scope():
                for gradient in dense:  # appended, not assigned: so a checkpoint finds them late
                    sum_ = tf.Variable(tf.zeros(gradient.shape, gradient.dtype), trainable=False)
                    self.sums.append(sum_)
        factor = 1 / self.passes if self._mean else 1.0

        def last() -> tf.Tensor:
            totals: list[Any] = [None] * len(gradients)
            for i, total, gradient in zip(here, self.sums, dense, strict=True):
                totals[i] = (total + gradient) * tf.cast(factor, gradient.dtype)
            good = step(totals)
            with tf.control_dependencies([good]):
                for total in self.sums:
                    total.assign(tf.zeros_like(total))
            return good

        def keep() -> tf.Tensor:
            for total, gradient in zip(self.sums, dense, strict=True):
                total.assign_add(gradient)
            return tf.constant(True)

        count = self.count.assign_add(1)
        return tf.cond(tf.equal(count % self.passes, 0), last, keep)
