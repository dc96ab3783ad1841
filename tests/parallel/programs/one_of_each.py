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


def each_method() -> list[Method]:
    """Of these one of each class of methods."""
    found: dict[type, Method] = {}
    for method in one_of_each():
        found.setdefault(type(method), method)
    return list(found.values())


def chosen(which: str) -> list[Method]:
    """`which` is "all", "selection", "classes" or "methods"."""
    choices = {"all": pairs.every_method, "selection": pairs.selection}
    choices |= {"classes": one_of_each, "methods": each_method}
    return choices[which]()
