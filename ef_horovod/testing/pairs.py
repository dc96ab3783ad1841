"""The pairs of methods and compressors for the contract tests."""

from __future__ import annotations

from ef_horovod.compressors.base import Compressor
from ef_horovod.compressors.randomk import RandomK
from ef_horovod.compressors.registry import COMPRESSORS
from ef_horovod.compressors.topk import TopK
from ef_horovod.methods.base import Method
from ef_horovod.methods.registry import METHODS


def every_compressor() -> list[Compressor]:
    """The examples of all registered compressors."""
    return [example for kind in COMPRESSORS.values() for example in kind.examples()]


def every_method() -> list[Method]:
    """The examples of all registered methods, with every compressor that they accept."""
    return [
        example
        for compressor in every_compressor()
        for kind in METHODS.values()
        for example in kind.examples(compressor)
    ]


def selection() -> list[Method]:
    """A few dozen of them, for slow tests: every compressor once, every method twice.

    A compressor comes with the first method that accepts it. A method comes with one compressor
    whose payloads are gathered, and one whose payloads are summed in flight.
    """
    of_compressors: dict[str, Method] = {}
    for method in every_method():
        of_compressors.setdefault(repr(method.compressor), method)
    usual = (TopK(ratio=0.2), RandomK(ratio=0.1))
    of_methods = [method for method in every_method() if method.compressor in usual]
    return list(dict.fromkeys([*of_compressors.values(), *of_methods]))
