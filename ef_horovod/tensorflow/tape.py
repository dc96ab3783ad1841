"""`ef.DistributedGradientTape`: a tape whose gradients are averaged over all ranks."""

from __future__ import annotations

import weakref
from typing import Any

import tensorflow as tf

from ef_horovod.compressors.identity import Identity
from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.methods.no_feedback import NoFeedback
from ef_horovod.tensorflow.reducer import Reducer


class DistributedGradientTape(tf.GradientTape):
    """Wrap a `tf.GradientTape` so that `gradient` returns averages over all ranks, compressed.

    A tape lives for one step, error memories for the whole training. They belong to a `Reducer`:
    give one, to save it with checkpoints and to read its `stats()`; or give a method, and one is
    made for the variables and kept as long as the first of them.

    Args:
        tape: a `tf.GradientTape` that recorded the loss.
        compression: an `ef.Reducer`, or a method such as EF21(TopK(ratio=0.01)).
        options: of `ef.Reducer`, if a method is given; the same at every step.

    Raises:
        UnsupportedError: options beside a reducer; an optimizer or reducer, beside which a tape
            with a method cannot be in a job with parameter servers.

    Example:
        with tf.GradientTape() as tape:
            loss = loss_of(model(inputs), labels)
        tape = ef.DistributedGradientTape(tape, compression=ef.ErrorFeedback(ef.OneBit()))
        gradients = tape.gradient(loss, model.trainable_variables)
    """

    def __init__(
        self,
        tape: tf.GradientTape,
        compression: Method | Reducer = NoFeedback(Identity()),  # noqa: B008 - frozen
        **options: Any,
    ) -> None:
        if isinstance(compression, Reducer) and options:
            raise UnsupportedError(
                f"got {sorted(options)} beside a Reducer, expected none; give them to ef.Reducer()"
            )
        if options.get("exchange") == "server" and not any(one.transport for one in _made):
            from ef_horovod.server.client import require_first

            require_first()
        self.__dict__ = tape.__dict__  # the same tape, with another `gradient`
        self._ef_compression, self._ef_options = compression, options

    def gradient(self, target: Any, sources: Any, *args: Any, **kwargs: Any) -> Any:
        """As `tf.GradientTape.gradient`, averaged over all ranks.

        Args:
            target: the loss.
            sources: variables, or a structure of them; those of the reducer in its order.

        Raises:
            UnsupportedError: a source is no variable. See also `ef.Reducer.reduce`.
        """
        gradients = super().gradient(target, sources, *args, **kwargs)
        flat_sources = tf.nest.flatten(sources)
        for source in flat_sources:
            if not isinstance(source, tf.Variable) and not hasattr(source, "value"):
                raise UnsupportedError(
                    f"got a source of type {type(source).__name__}, expected variables, for their "
                    "gradients are averaged; take gradients of tensors from the plain tape"
                )
        reducer = self._ef_compression
        if not isinstance(reducer, Reducer):
            reducer = _kept_reducer(flat_sources, reducer, self._ef_options)
        flat = tf.nest.flatten(gradients, expand_composites=False)
        return tf.nest.pack_sequence_as(sources, reducer.reduce(flat))


def _kept_reducer(variables: list[Any], method: Method, options: dict[str, Any]) -> Reducer:
    """The reducer of these variables, made at the first call and kept with the first of them.

    A tape is made anew in every eager step and every trace; with a reducer of its own, each would
    start with empty memories.
    """
    kept = variables[0].__dict__.setdefault("_ef_reducers", {})
    key = (tuple(id(v) for v in variables), method, tuple(sorted(options.items())))
    if key not in kept:
        kept[key] = Reducer(variables, method, **options)
        _made.add(kept[key])
    return kept[key]


_made: weakref.WeakSet[Reducer] = weakref.WeakSet()  # by tapes
