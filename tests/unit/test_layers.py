"""Rooms of the package import downwards only, and no two modules import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ef_horovod

PACKAGE = Path(ef_horovod.__file__).parent
# From the ground up: a room imports itself and those above it in this list. docs/design.md says
# what each of them is for.
ROOMS = (
    "errors",
    "common",
    "horovod_build",
    "arrays",
    "wire",
    "compressors",
    "methods",
    "theory",
    "transports",
    "exchange",
    "cost",
    "training",
    "simulation",
    "server",
    "torch",
    "tensorflow",
    "testing",
    "cli",
)
# Training does not need what papers say in numbers, nor torch what TensorFlow needs.
APART = {"theory": set(ROOMS), "torch": {"tensorflow"}}


def modules() -> dict[str, Path]:
    """All modules of the package by name; a package by that of its `__init__`."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, bool]]:
    """Modules of the package that one imports, anywhere, and whether it does so for types only."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in inside]
        for name in names:
            if name in known:
                yield name, id(node) in for_types


def room_of(module: str) -> str:
    """The room of a module; "" is the top."""
    return f"{module}.".split(".")[1]


def upward(edges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those imports that point to a room above, or to one that is kept apart."""
    return [
        (module, other)
        for module, other in edges
        if room_of(module) != room_of(other) != ""
        and room_of(module) not in ("", "__main__")
        and (
            ROOMS.index(room_of(other)) > ROOMS.index(room_of(module))
            or room_of(module) in APART.get(room_of(other), ())
        )
    ]


def edges(*, for_types: bool) -> list[tuple[str, str]]:
    """(module, what it imports) for the whole package."""
    known = modules()
    return [
        (module, other)
        for module, path in known.items()
        for other, typed in imports(path, known)
        if for_types or not typed
    ]


def test_every_module_is_in_a_room():
    rooms = {room_of(module) for module in modules()}
    assert rooms == {"", "__main__", *ROOMS}


def test_imports_point_downwards_those_for_types_too():
    assert upward(edges(for_types=True)) == []


def test_no_modules_import_each_other():
    graph: dict[str, set[str]] = {module: set() for module in modules()}
    for module, other in edges(for_types=False):
        if module != other and not module.startswith(f"{other}."):
            graph[module].add(other)
    TopologicalSorter(graph).prepare()


def test_both_are_noticed():
    """The checks above can fail."""
    up = ("ef_horovod.methods.ef21", "ef_horovod.exchange.channel")
    assert upward([up, up[::-1]]) == [up]
    apart = ("ef_horovod.cli.main", "ef_horovod.theory.steps")
    assert upward([apart]) == [apart]
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
