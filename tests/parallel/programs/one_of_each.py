"""Of the pairs of methods and compressors those that have every class of both."""

from __future__ import annotations

from ef_horovod import Method
from ef_horovod.testing import pairs


def one_of_each() -> list[Method]:
    """A method with each class of compressors, then a compressor with each other method."""
    of_compressors: dict[type, Method] = {}
    for method in pairs.selection():
        of_compressors.setdefault(type(method.compressor), method)
    of_methods = {type(method): method for method in [*pairs.every_method(), *pairs.selection()]}
    for method in of_compressors.values():
        of_methods.pop(type(method), None)
    return [*of_compressors.values(), *of_methods.values()]


def chosen(which: str) -> list[Method]:
    """`which` is "all", "selection" or "classes"."""
    choices = {"all": pairs.every_method, "selection": pairs.selection, "classes": one_of_each}
    return choices[which]()
