"""The three frameworks have exactly the array functions of the list, with the same parameters."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

import pytest

from ef_horovod.arrays.functions import ArrayFunctions

LISTED = {name: f for name, f in vars(ArrayFunctions).items() if inspect.isfunction(f)}
LISTED = {name: f for name, f in LISTED.items() if not name.startswith("_")}


def functions_of(module: ModuleType) -> dict[str, inspect.Signature]:
    """The public array functions of a module; wrapped ones by the signature of their device op."""
    return {
        name: inspect.signature(getattr(value, "on_device", value))
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__.startswith("ef_horovod.arrays")
        and not name.startswith("_")
    }


@pytest.mark.parametrize("framework", ["numpy", "torch", "tensorflow"])
def test_a_framework_has_exactly_the_listed_functions(framework: str) -> None:
    found = functions_of(importlib.import_module(f"ef_horovod.arrays.{framework}"))
    assert sorted(found) == sorted(LISTED)


@pytest.mark.parametrize("framework", ["numpy", "torch", "tensorflow"])
def test_their_parameters_are_the_listed_ones(framework: str) -> None:
    found = functions_of(importlib.import_module(f"ef_horovod.arrays.{framework}"))
    for name, function in LISTED.items():
        _, *listed = facts(inspect.signature(function))
        assert facts(found[name]) == listed, name


def facts(signature: inspect.Signature) -> list[tuple]:
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]
