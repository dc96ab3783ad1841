"""Registry of compressors, used by tests, docs and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ef_horovod.common.options import whole
from ef_horovod.common.registry import new_table, origin, require_free_name

if TYPE_CHECKING:
    from ef_horovod.compressors.base import Compressor

COMPRESSORS: dict[str, type[Compressor]] = new_table()

_C = TypeVar("_C", bound="type[Compressor]")


def register_compressor(wire_id: int) -> Callable[[_C], _C]:
    """Class decorator that registers a compressor under its name and its number on the wire.

    Args:
        wire_id: 0 to 255, never reused; 128 and up are free for use outside this package.

    A module that is imported again, as in a notebook, registers its classes again.

    Raises:
        ValueError: the number is out of range, or another class has the number or the name.
    """

    def register(cls: _C) -> _C:
        number = whole(cls.__name__, "wire_id", wire_id, 0, 255, "take one from 128 on")
        require_free_name(cls)
        other = compressor_of(number)
        if other is not None and origin(other) != origin(cls):
            taken = sorted(kind.wire_id for kind in COMPRESSORS.values())
            raise ValueError(
                f"{origin(cls)} asks for wire_id {number}, which {origin(other)} has, expected "
                f"one that is free (taken: {taken}); take another one"
            )
        cls.wire_id = number
        COMPRESSORS[cls.__name__] = cls
        return cls

    return register


def compressor_of(wire_id: int) -> type[Compressor] | None:
    """The compressor class that a payload's header names, or None."""
    return next((kind for kind in COMPRESSORS.values() if kind.wire_id == wire_id), None)
