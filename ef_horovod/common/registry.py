"""Tables of registered classes by name: one for compressors, one for methods.

Classes register themselves. Those of other packages do so in the same way, with no other edits.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any

from ef_horovod.errors import UnsupportedError

_TABLES: list[dict[str, Any]] = []


def new_table() -> dict[str, Any]:
    """A new table of classes by name; each name is in one table only."""
    _TABLES.append({})
    return _TABLES[-1]


def require_free_name(cls: type) -> None:
    """Raise if another class of any table has this name; upper and lower case count as equal.

    Raises:
        ValueError: another class has it.
    """
    for other in (kind for table in _TABLES for kind in table.values()):
        if other.__name__.lower() == cls.__name__.lower() and origin(other) != origin(cls):
            raise ValueError(
                f"got {origin(cls)} to register, expected a name that no other class has, but "
                f"{origin(other)} is registered; give the new class another name"
            )


def origin(cls: type) -> str:
    """Module and name of a class: equal when its module is imported again."""
    return f"{cls.__module__}.{cls.__qualname__}"


def import_all(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that each registers its classes."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def add_import_option(parser: argparse.ArgumentParser) -> None:
    """Add `--import` to a command; pass the parsed `modules` to `load`."""
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        dest="modules",
        metavar="MODULE",
        help="import this module or package first, which registers compressors, methods or "
        "exchanges of yours (repeatable)",
    )


def load(modules: Iterable[str]) -> None:
    """Import modules or packages of others, so that their classes are registered.

    This is for commands; training scripts import such modules directly, on all ranks. A package of
    several modules registers all of them by `import_all(__name__, __path__)` in its `__init__.py`.

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
