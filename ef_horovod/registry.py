"""Where compressors and methods announce themselves: tests, docs and benchmarks look here.

A third party registers from outside the package in the same way; nothing else has to be edited.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from ef_horovod.errors import UnsupportedError

if TYPE_CHECKING:
    from ef_horovod.compressors.base import Compressor
    from ef_horovod.methods.base import Method

COMPRESSORS: dict[str, type[Compressor]] = {}
METHODS: dict[str, type[Method]] = {}
_BY_WIRE_ID: dict[int, type[Compressor]] = {}

_C = TypeVar("_C", bound="type[Compressor]")
_M = TypeVar("_M", bound="type[Method]")


def register_compressor(wire_id: int) -> Callable[[_C], _C]:
    """Class decorator that makes a compressor known under its name and its number on the wire.

    Args:
        wire_id: 0 to 255, never reused; 128 and up are free for use outside this package.

    Raises:
        ValueError: the number is out of range or taken by another compressor.
    """

    def register(cls: _C) -> _C:
        other = _BY_WIRE_ID.get(wire_id)
        if not 0 <= wire_id <= 255 or (other is not None and other.__name__ != cls.__name__):
            raise ValueError(
                f"{cls.__name__} asks for wire_id {wire_id}, expected a number from 0 to 255 that "
                f"no other compressor has (taken: {sorted(_BY_WIRE_ID)}); take another one"
            )
        cls.wire_id = wire_id
        _BY_WIRE_ID[wire_id] = COMPRESSORS[cls.__name__] = cls
        return cls

    return register


def register_method(cls: _M) -> _M:
    """Class decorator that makes an error-feedback method known under its name."""
    METHODS[cls.__name__] = cls
    return cls


def compressor_of(wire_id: int) -> type[Compressor] | None:
    """The compressor class that a payload's header names, or None."""
    return _BY_WIRE_ID.get(wire_id)


def import_all(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that each registers what it defines."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def load(modules: Iterable[str]) -> None:
    """Import modules or packages of others, so that what they define is known here.

    Training scripts simply import them, on all ranks; this is for commands, which are given names.
    A package of several modules registers them all by `import_all(__name__, __path__)` in its
    `__init__.py`.

    Args:
        modules: dotted names, as in an import statement.

    Raises:
        UnsupportedError: there is no such module.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UnsupportedError(
                f"got no module '{error.name}' when importing '{name}', expected one that Python "
                "finds; install its package, or put its folder into PYTHONPATH"
            ) from error
