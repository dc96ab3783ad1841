"""The registry of exchanges, by the names that users write."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from ef_horovod.exchange.base import Exchange

EXCHANGES: dict[str, Exchange] = {}

_E = TypeVar("_E", bound="type[Exchange]")


def register_exchange(cls: _E) -> _E:
    """Class decorator that registers an exchange under its `name`.

    A module that is imported again, as in a notebook, registers its class again.

    Raises:
        ValueError: the name is taken by another class, or reserved by `exchange=`.
    """
    other = EXCHANGES.get(cls.name)
    here, there = (f"{kind.__module__}.{kind.__qualname__}" for kind in (cls, type(other)))
    if cls.name.partition(":")[0] == "auto" or (other is not None and here != there):
        raise ValueError(
            f"{here} asks for the name {cls.name!r}, which "
            f"{there if other else 'the choice of an exchange'} has, expected one that is free "
            f"(taken: {sorted(EXCHANGES)}); take another one"
        )
    EXCHANGES[cls.name] = cls()
    return cls


def exchange_of(name: str) -> Exchange:
    """The exchange with a name.

    Raises:
        ValueError: there is none.

    Example:
        >>> exchange_of("gather").name
        'gather'
    """
    if name not in EXCHANGES:
        raise ValueError(
            f"got exchange={name!r}, expected one of {('auto', *EXCHANGES)}, or a network as in "
            "'auto:1gbit'; pick one"
        )
    return EXCHANGES[name]
