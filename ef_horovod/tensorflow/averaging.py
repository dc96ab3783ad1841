"""Gradients in a wrapped optimizer: accumulated, averaged, and applied if the step is good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.stats import ChannelStats, total_stats
from ef_horovod.tensorflow.checkpoint import TrackedState
from ef_horovod.tensorflow.engine import Engine, appeared
from ef_horovod.tensorflow.reducer import Reducer
from ef_horovod.tensorflow.variables import path_of
from ef_horovod.training.driver import require_state

Apply = Callable[[list[Any]], None]
Step = Callable[[list[Any]], tf.Tensor]  # averages and applies gradients; True if good


class Averaging(tf.Module):
    """The reducers of an optimizer, and the accumulation between a call and a step.

    The main reducer is made for all variables that the optimizer is built for. It averages the
    variables of the first call. Each other set of variables gets another reducer.

    Args:
        make_reducer: makes a reducer from variables.
        passes: calls per step.
        mean: whether a step gets the mean (False: the sum) of its passes' gradients.
        handles_nan: whether the optimizer itself leaves out steps with NaNs.
    """

    owner = "ef.DistributedOptimizer"  # for messages

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
        self.others: dict[str, Reducer] = {}  # by places; tracked, so that checkpoints find them
        # A function, so that checkpoints do not track the model's variables here.
        self._built_for: Callable[[], list[Any]] = list
        self._first: frozenset[int] = frozenset()  # places of the variables of the first call
        self._loaded: dict[str, Any] = {}  # states of sets not seen yet

    def build(self, variables: list[Any]) -> TrackedState | None:
        """Make the reducer of all variables, once; returns its error-feedback state, if any."""
        if self.reducer is not None:
            return None
        self.reducer, self._built_for = self._make_reducer(variables), lambda: variables
        return self.reducer.tracked_state

    def average(self, gradients: list[Any], variables: list[Any]) -> list[Any]:
        """Ops that average gradients; NaN if the step is not good."""
        if self.accumulation.passes > 1:
            raise UnsupportedError(
                "got accumulated gradients inside a loss scaler, expected the scaler inside; write "
                "ef.DistributedOptimizer(tf_keras.mixed_precision.LossScaleOptimizer(optimizer))"
            )
        return self._part(variables).reduce(gradients, 1.0)[0]

    def step(
        self, gradients: list[Any], variables: list[Any], loss_scale: Any, apply: Apply
    ) -> None:
        """Ops that average the gradients and apply them, if the step is good.

        Raises:
            UnsupportedError: the optimizer was not built for these variables, or this is another
                set of variables where only one is supported.
        """
        part = self._part(variables)
        self.accumulation.run(
            gradients,
            variables,
            lambda gradients: self._take(part, gradients, variables, loss_scale, apply),
        )

    def in_common(self, variables: list[Any]) -> list[Any]:
        """Those of an optimizer's variables that are equal on all ranks."""
        return variables

    def _take(
        self, part: Part, gradients: list[Any], variables: list[Any], loss_scale: Any, apply: Apply
    ) -> tf.Tensor:
        """Ops of a step, once its gradients are accumulated; returns whether it is good."""
        averages, good = part.reduce(gradients, loss_scale)
        if self._handles_nan or not part.reducer.active:
            apply(averages)
            return good

        def applied() -> tf.Tensor:
            apply(averages)
            return tf.constant(True)

        return tf.cond(good, applied, lambda: tf.constant(False))

    @property
    def drivers(self) -> list[Engine]:
        """The engines of all reducers."""
        return [engine for reducer in self._reducers() for engine in reducer.drivers]

    def stats(self) -> list[ChannelStats]:
        """Rows of all buckets, and the total."""
        rows = [row for reducer in self._reducers() for row in reducer.stats()[:-1]]
        return [*rows, total_stats(rows)] if rows else []

    def state_dict(self) -> dict[str, Any]:
        """Error-feedback state of the first set; that of the other sets under "others"."""
        if self.reducer is None:
            return {}
        others = {key: one.compression_state_dict() for key, one in self.others.items()}
        return self.reducer.compression_state_dict() | ({"others": others} if others else {})

    def merged_state_dict(self) -> dict[str, Any]:
        """The same of all ranks together; collective."""
        if self.reducer is None:
            return {}
        others = {key: self.others[key].merged_state_dict() for key in sorted(self.others)}
        return self.reducer.merged_state_dict() | ({"others": others} if others else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load it, now or when a set is first seen; the optimizer must be built."""
        assert self.reducer is not None
        require_state(state)
        self._loaded = dict(state.get("others", {}))
        self.reducer.load_compression_state_dict(
            {key: value for key, value in state.items() if key != "others"}
        )
        for key in self._loaded.keys() & self.others.keys():
            self.others[key].load_compression_state_dict(self._loaded.pop(key))

    def _reducers(self) -> list[Reducer]:
        return [one for one in (self.reducer, *self.others.values()) if one is not None]

    def _part(self, variables: list[Any]) -> Part:
        """The reducer of these variables, and their places in it."""
        assert self.reducer is not None
        known = self._built_for()
        place_of = {id(v): i for i, v in enumerate(known)}
        for variable in variables:
            if id(variable) not in place_of:
                raise UnsupportedError(
                    f"got a gradient of '{path_of(variable)}', expected variables that the "
                    "optimizer was built for; call optimizer.build() with all that will be "
                    "trained, before the first step, or wrap an optimizer for each set of variables"
                )
        places = [place_of[id(v)] for v in variables]
        chosen = frozenset(places)
        if chosen == (self._first or chosen):
            self._first = chosen
            return Part(self.reducer, places, len(place_of))
        self._require_many_sets(variables)
        ordered = sorted(places)
        key = "_".join(map(str, ordered))
        if key not in self.others:
            reducer = self._make_reducer([known[i] for i in ordered])
            if key in self._loaded:
                reducer.load_compression_state_dict(self._loaded.pop(key))
            self.others[key] = reducer
        return Part(self.others[key], [ordered.index(i) for i in places], len(ordered))

    def _require_many_sets(self, variables: list[Any]) -> None:
        """Raise where only one reducer is supported."""
        if what := self._one_set():
            raise UnsupportedError(
                f"got gradients of {len(variables)} variables with {what}, expected those of the "
                f"first call ({len(self._first)}); wrap an optimizer for each set of variables"
            )

    def _one_set(self) -> str:
        """What allows only one set of variables, or ""."""
        assert self.reducer is not None
        transport = self.reducer.transport
        if self.accumulation.passes > 1:
            return "gradient accumulation"
        return "servers" if transport is not None and transport.has_server else ""


class Part(NamedTuple):
    """A reducer, and the places of the given variables in it."""

    reducer: Reducer
    places: list[int]
    out_of: int  # number of the reducer's variables

    def reduce(self, gradients: list[Any], loss_scale: Any) -> tuple[list[Any], tf.Tensor]:
        """`Reducer.reduce_scaled`, in the order of the places."""
        everyones: list[Any] = [None] * self.out_of
        for place, gradient in zip(self.places, gradients, strict=True):
            everyones[place] = gradient
        averages, good = self.reducer.reduce_scaled(everyones, loss_scale)
        return [averages[place] for place in self.places], good


class Accumulation(tf.Module):
    """Calls a step once in `passes` calls, with the sum or mean of their gradients.

    Args:
        passes: calls per step.
        mean: whether the step gets means (False: sums).
    """

    def __init__(self, passes: int, mean: bool) -> None:
        super().__init__(name="ef_accumulation")
        self.passes, self._mean = passes, mean
        self._places: tuple[int, ...] = ()  # of the sums, among the gradients
        self.sums: list[tf.Variable] = []
        with tf.init_scope():
            self.count = tf.Variable(0, trainable=False, dtype=tf.int64)

    def run(self, gradients: list[Any], variables: list[Any], step: Step) -> tf.Tensor:
        """Ops that add the gradients, and take the step at the last pass.

        Args:
            gradients: tensors, `tf.IndexedSlices` (which become dense) or None. None counts as
                zeros if there was a gradient at the first call.
            variables: of the gradients.
            step: gets gradients in the same order.

        Returns:
            Whether the step was good; True for a pass without a step.

        Raises:
            UnsupportedError: a gradient was None at the first call and is not now.
        """
        if self.passes == 1:
            return step(gradients)
        self._open(gradients)
        for i, gradient in enumerate(gradients):
            if gradient is not None and i not in self._places:
                raise appeared(variables[i])
        factor = 1 / self.passes if self._mean else 1.0
        pairs = list(zip(self._places, self.sums, strict=True))
        dense = {i: tf.convert_to_tensor(g) for i, g in enumerate(gradients) if g is not None}

        def last() -> tf.Tensor:
            totals: list[Any] = [None] * len(gradients)
            for i, total in pairs:
                whole = total + dense[i] if i in dense else total.read_value()
                totals[i] = whole * tf.cast(factor, whole.dtype)
            good = step(totals)
            with tf.control_dependencies([good]):
                for total in self.sums:
                    total.assign(tf.zeros_like(total))
            return good

        def keep() -> tf.Tensor:
            for i, total in pairs:
                if i in dense:
                    total.assign_add(dense[i])
            return tf.constant(True)

        count = self.count.assign_add(1)
        return tf.cond(tf.equal(count % self.passes, 0), last, keep)

    def _open(self, gradients: list[Any]) -> None:
        """At the first call, make a sum for each gradient that is not None."""
        if self.sums:
            return
        self._places = tuple(i for i, gradient in enumerate(gradients) if gradient is not None)
        with tf.init_scope():
            for i in self._places:  # appended, not assigned: restored checkpoints find them later
                zeros = tf.zeros(gradients[i].shape, gradients[i].dtype)
                self.sums.append(tf.Variable(zeros, trainable=False))
