"""`ef.DistributedGradientTape`: a tape whose gradients are averaged over all ranks."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from ef_horovod.compressors.identity import Identity
from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.methods.no_feedback import NoFeedback
from ef_horovod.tensorflow.options import ReducerOptions
from ef_horovod.tensorflow.reducer import Reducer, meaning_of
from ef_horovod.tensorflow.variables import is_variable, name_variables, native
from ef_horovod.training.choice import wants_server

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DistributedGradientTape(tf.GradientTape):
    """Wrap a `tf.GradientTape` so that `gradient` returns averages over all ranks, compressed.

    A tape lives for one step, error-feedback state for the whole training. The state belongs to a
    `Reducer`. Pass a reducer if you want to save it with checkpoints or to read its `stats()`. If
    you pass a method, a reducer is made for each set of variables, in any order, and kept as long
    as the variables. Method and options must mean the same at each step.

    Args:
        tape: a `tf.GradientTape` that recorded the loss.
        compression: an `ef.Reducer`, or a method such as EF21(TopK(ratio=0.01)).
        options: of `ef.Reducer`, if you pass a method.

    Raises:
        UnsupportedError: options were passed with a reducer. In a job with parameter servers: a
            method was passed, but an optimizer or reducer exists already.

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
        **options: Unpack[ReducerOptions],
    ) -> None:
        if isinstance(compression, Reducer) and options:
            raise UnsupportedError(
                f"got {sorted(options)} beside a Reducer, expected none; give them to ef.Reducer()"
            )
        if wants_server(options.get("exchange", "auto")) and not any(
            one.transport for one in _made
        ):
            from ef_horovod.server.link import require_first

            require_first()
        self.__dict__ = tape.__dict__  # the same tape, with another `gradient`
        self._ef_compression, self._ef_options = compression, options

    def gradient(self, target: Any, sources: Any, *args: Any, **kwargs: Any) -> Any:
        """As `tf.GradientTape.gradient`, averaged over all ranks.

        Args:
            target: the loss.
            sources: variables, or a structure of them; those of the reducer in its order.

        Raises:
            UnsupportedError: a source is not a variable; or method and options differ from those of
                an earlier step, which would start with empty error-feedback state. See also
                `ef.Reducer.reduce`.
        """
        flat_sources = tf.nest.flatten(sources)
        for source in flat_sources:
            if not is_variable(source):
                raise UnsupportedError(
                    f"got a source of type {type(source).__name__}, expected variables, because "
                    "their gradients are averaged; take gradients of tensors from the plain tape"
                )
        gradients = super().gradient(target, sources, *args, **kwargs)
        flat = tf.nest.flatten(gradients, expand_composites=False)
        averages = self._ef_averaged(flat_sources, flat)
        return tf.nest.pack_sequence_as(sources, averages)

    def _ef_averaged(self, variables: list[Any], gradients: list[Any]) -> list[Any]:
        if isinstance(self._ef_compression, Reducer):
            return self._ef_compression.reduce(gradients)
        reducer, order = _kept_reducer(variables, self._ef_compression, self._ef_options)
        averages = reducer.reduce([gradients[i] for i in order])
        back = sorted(range(len(order)), key=order.__getitem__)
        return [averages[i] for i in back]


class _Kept(NamedTuple):
    reducer: Reducer
    ids: tuple[int, ...]  # of its variables, in its order
    meaning: dict[str, Any]  # of method and options


def _kept_reducer(
    variables: list[Any], method: Method, options: ReducerOptions
) -> tuple[Reducer, list[int]]:
    """The reducer of these variables, made at the first call and stored in one of them.

    Every eager step and every trace makes a new tape. If each tape had a new reducer, each would
    start with empty error-feedback state.

    Returns:
        The reducer, and the places of its variables among the given ones.

    Raises:
        UnsupportedError: it was made with another method or other options.
    """
    place_of = {id(native(v)): i for i, v in enumerate(variables)}
    if len(place_of) < len(variables):
        name_variables(variables)  # raises, and names the duplicate
    owner = native(min(variables, key=lambda v: id(native(v))))
    all_kept = owner.__dict__.setdefault("_ef_reducers", {})
    kept = all_kept.get(frozenset(place_of))
    if kept is None:
        reducer = Reducer(variables, method, **options)
        kept = _Kept(reducer, tuple(place_of), meaning_of(variables, method, **options))
        all_kept[frozenset(place_of)] = kept
        _made.add(reducer)
    order = [place_of[i] for i in kept.ids]
    now = meaning_of([variables[i] for i in order], method, **options)
    for option, before in kept.meaning.items():
        if now[option] != before:
            raise UnsupportedError(
                f"got a tape with {option}={now[option]!r} for variables that had {before!r} at "
                "an earlier step, expected the same at every step: another reducer would start "
                "with empty error-feedback state; make method and options once, before the loop, "
                "or an ef.Reducer for each of them"
            )
    return kept.reducer, order


_made: weakref.WeakSet[Reducer] = weakref.WeakSet()  # by tapes
