"""Registry of methods, used by tests, docs and benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from ef_horovod.common.registry import new_table, require_free_name

if TYPE_CHECKING:
    from ef_horovod.methods.base import Method

METHODS: dict[str, type[Method]] = new_table()

_M = TypeVar("_M", bound="type[Method]")


def register_method(cls: _M) -> _M:
    """Class decorator that registers an error-feedback method under its name.

    A module that is imported again, as in a notebook, registers its classes again.

    Raises:
        ValueError: another class has the name.
    """
    require_free_name(cls)
    METHODS[cls.__name__] = cls
    return cls
