"""Where methods announce themselves: tests, docs and benchmarks look here."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from ef_horovod.common.registry import new_table, require_free_name

if TYPE_CHECKING:
    from ef_horovod.methods.base import Method

METHODS: dict[str, type[Method]] = new_table()

_M = TypeVar("_M", bound="type[Method]")


def register_method(cls: _M) -> _M:
    """Class decorator that makes an error-feedback method known under its name.

    A module that is imported again, as in a notebook, registers its classes anew.

    Raises:
        ValueError: the name is another class's.
    """
    require_free_name(cls)
    METHODS[cls.__name__] = cls
    return cls
