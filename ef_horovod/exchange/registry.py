"""The registry of exchanges, by the names that users write."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.base import Exchange
from ef_horovod.methods.base import Method

EXCHANGES: dict[str, Exchange] = {}

_E = TypeVar("_E", bound="type[Exchange]")


def register_exchange(cls: _E) -> _E:
    """Class decorator that registers an exchange under its `name`.

    A module that is imported again, as in a notebook, registers its class again.

    Raises:
        ValueError: the name is taken by another class, or reserved by `exchange=`.
        UnsupportedError: it is no exchange, or lacks a part.
    """
    _require_exchange(cls)
    other = EXCHANGES.get(cls.name)
    here, there = (f"{kind.__module__}.{kind.__qualname__}" for kind in (cls, type(other)))
    if cls.name == "auto" or (other is not None and here != there):
        raise ValueError(
            f"{here} asks for the name {cls.name!r}, which "
            f"{there if other else 'the choice of an exchange'} has, expected one that is free "
            f"(taken: {sorted(EXCHANGES)}); take another one"
        )
    EXCHANGES[cls.name] = cls()
    return cls


def _require_exchange(cls: Any) -> None:
    """Raise for a class that would fail later, or be taken for another exchange.

    Raises:
        UnsupportedError: always then.
    """
    name = getattr(cls, "name", None)
    if not isinstance(cls, type) or not issubclass(cls, Exchange):
        raise UnsupportedError(
            f"register_exchange got {cls!r}, expected a subclass of Exchange; write "
            "@register_exchange above the class, without brackets"
        )
    if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise UnsupportedError(
            f"{cls.__qualname__} got name={name!r}, expected lower-case letters, digits and _; "
            'write name = "ring" in the class'
        )
    if cls.open is Exchange.open:
        special = not cls.compresses or cls.has_answers or cls.needs_server
        if special or cls.start is Exchange.start:
            raise UnsupportedError(
                f"exchange {name!r} has no {'open' if special else 'start'}, expected one; "
                "`start` exchanges payloads, and `open` returns the channel that compresses=False, "
                "has_answers or needs_server need"
            )


def usual_exchange(method: Method) -> Exchange:
    """ "reduce" for linear compressors, "gather" for the others: their numbers are the same."""
    return EXCHANGES["reduce" if method.allreducible else "gather"]


def exchange_of(name: str) -> Exchange:
    """The exchange with a name, such as "gather" or "hierarchical:gather".

    Raises:
        ValueError: there is none.

    Example:
        >>> exchange_of("gather").name
        'gather'
    """
    kind, colon, inner = name.partition(":")
    if colon and kind in EXCHANGES:
        return EXCHANGES[kind].with_inner(inner)
    if name not in EXCHANGES:
        raise ValueError(
            f"got exchange={name!r}, expected one of {('auto', *EXCHANGES)}, or a network as in "
            "'auto:1gbit'; pick one, or import the module that registers yours on all ranks"
        )
    return EXCHANGES[name]
