"""Undo of a committed step: restores a method's state from before.

Most methods swap vectors when they commit and change none in place, so the old state still exists.
Methods declare the fields that they change in place (`Method.reduced_in_place`,
`Method.pulled_in_place`), and only these are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ef_horovod.arrays import Array, namespace


class Undo(NamedTuple):
    """A state, and copies of the vectors in it that the next commit changes in place."""

    state: Any
    copies: tuple[tuple[Array, Array], ...]  # (vector of the state, its values)

    def restore(self) -> Any:
        """The old state; valid until the step after the undone one is pushed or reduced."""
        for vector, values in self.copies:
            namespace(vector).assign(vector, values)
        return self.state


class Undoer:
    """Makes `Undo`s of one state; reuses the memory of its copies in each step."""

    def __init__(self) -> None:
        self._room: dict[tuple[int, int], Array] = {}  # by address and length

    def before(self, state: Any, scratch: frozenset[str], changed: frozenset[str] | None) -> Undo:
        """An `Undo` that restores this state.

        Args:
            state: NamedTuple of a method.
            scratch: its fields that hold nothing between steps.
            changed: its fields that are changed in place; None if unknown.
        """
        copies = []
        for name, vector in vectors_of(state, scratch):
            if changed is None or name.partition(".")[0] in changed:
                room = self._room_for(vector)
                namespace(room).assign(room, vector)
                copies.append((vector, room))
        return Undo(state, tuple(copies))

    def _room_for(self, vector: Array) -> Array:
        xp, length = namespace(vector), vector.shape[0]
        place = (xp.address(vector), length)
        if place not in self._room:
            self._room[place] = xp.zeros(length, getattr(vector, "device", None))
        return self._room[place]


def vectors_of(state: Any, scratch: frozenset[str]) -> Iterator[tuple[str, Array]]:
    """The vectors that a state keeps between steps, as FIELD or FIELD.INDEX, without scalars."""
    for field, value in state._asdict().items():
        if field in scratch:
            continue
        if isinstance(value, tuple):
            yield from ((f"{field}.{i}", v) for i, v in enumerate(value) if hasattr(v, "shape"))
        elif hasattr(value, "shape"):
            yield field, value
