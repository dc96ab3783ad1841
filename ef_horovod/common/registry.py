"""Where compressors and methods announce themselves: tests, docs and benchmarks look here.

A third party registers from outside the package in the same way; nothing else has to be edited.
"""

from __future__ import annotations

import argparse
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

    A module that is imported again, as in a notebook, registers its classes anew.

    Raises:
        ValueError: the number is out of range, or it or the name is another class's.
    """

    def register(cls: _C) -> _C:
        from ef_horovod.common.options import whole  # needs NumPy, which commands' options do not

        number = whole(cls.__name__, "wire_id", wire_id, 0, 255, "take one from 128 on")
        _require_free_name(cls)
        other = _BY_WIRE_ID.get(number)
        if other is not None and _origin(other) != _origin(cls):
            raise ValueError(
                f"{_origin(cls)} asks for wire_id {number}, which {_origin(other)} has, expected "
                f"one that is free (taken: {sorted(_BY_WIRE_ID)}); take another one"
            )
        before = COMPRESSORS.get(cls.__name__)
        if before is not None and before.wire_id != number:  # edited, and imported again
            del _BY_WIRE_ID[before.wire_id]
        cls.wire_id = number
        _BY_WIRE_ID[number] = COMPRESSORS[cls.__name__] = cls
        return cls

    return register


def register_method(cls: _M) -> _M:
    """Class decorator that makes an error-feedback method known under its name.

    A module that is imported again, as in a notebook, registers its classes anew.

    Raises:
        ValueError: the name is another class's.
    """
    _require_free_name(cls)
    METHODS[cls.__name__] = cls
    return cls


def _require_free_name(cls: type) -> None:
    """Raise if another compressor or method has the name; texts name them in any case.

    Raises:
        ValueError: there is one.
    """
    for other in (*COMPRESSORS.values(), *METHODS.values()):
        if other.__name__.lower() == cls.__name__.lower() and _origin(other) != _origin(cls):
            raise ValueError(
                f"got {_origin(cls)} to register, expected a name that no other class has, but "
                f"{_origin(other)} is registered; give the new class another name"
            )


def _origin(cls: type) -> str:
    """Where a class is from: equal when its module is imported again."""
    return f"{cls.__module__}.{cls.__qualname__}"


def compressor_of(wire_id: int) -> type[Compressor] | None:
    """The compressor class that a payload's header names, or None."""
    return _BY_WIRE_ID.get(wire_id)


def import_all(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that each registers what it defines."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def add_import_option(parser: argparse.ArgumentParser) -> None:
    """Give a command `--import`, whose `modules` are for `load`."""
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        dest="modules",
        metavar="MODULE",
        help="import this module or package first, for compressors and methods of yours "
        "(repeatable)",
    )


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
