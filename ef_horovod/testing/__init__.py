"""Checks of the contracts of compressors and methods, also for third-party ones.

    from ef_horovod.testing import check_compressor, check_method

    def test_mine():
        check_compressor(MyCompressor(0.1), frameworks=("numpy", "torch"))
        check_method(MyMethod(MyCompressor(0.1)), frameworks=("numpy", "torch"))

Each check is a function that raises AssertionError and names the broken clause. `each_check` and
`each_method_check` yield the checks that apply to an instance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from ef_horovod.compressors.base import Compressor
from ef_horovod.testing.claims import (
    check_contraction,
    check_keys,
    check_linear,
    check_properties,
    check_unbiased,
)
from ef_horovod.testing.damage import check_damage
from ef_horovod.testing.inputs import (
    check_add_to,
    check_clear,
    check_dtypes,
    check_finite,
    check_generator_untouched,
    check_largest_numbers,
    check_mean,
    check_shapes,
    check_skip,
    check_vector,
    check_zero,
)
from ef_horovod.testing.methods import check_method, each_method_check
from ef_horovod.testing.tools import LENGTHS, vectors

__all__ = [
    "check_compressor",
    "check_method",
    "check_vector",
    "each_check",
    "each_method_check",
    "vectors",
]


def check_compressor(compressor: Compressor, *, frameworks: Sequence[str] = ("numpy",)) -> None:
    """Raise AssertionError, naming the broken clause, unless a compressor keeps the contract.

    Args:
        compressor: instance of a registered class.
        frameworks: "numpy", and others whose arrays it must accept: "torch", "tensorflow", and
            "torch:cuda" for tensors on a GPU.

    Example:
        >>> import ef_horovod as ef
        >>> check_compressor(ef.TopK(ratio=0.1))
    """
    for check in each_check(compressor, frameworks):
        check()


def each_check(compressor: Compressor, frameworks: Sequence[str] = ("numpy",)) -> Iterator[partial]:
    """The checks that apply to a compressor, as functions without arguments."""
    yield partial(check_properties, compressor)
    for d in LENGTHS:
        for x in vectors(d):
            yield partial(check_vector, compressor, x, frameworks)
    yield partial(check_zero, compressor)
    yield partial(check_skip, compressor)
    yield partial(check_largest_numbers, compressor)
    yield partial(check_add_to, compressor)
    yield partial(check_mean, compressor)
    yield partial(check_clear, compressor)
    yield partial(check_damage, compressor)
    yield partial(check_keys, compressor)
    if compressor.contraction(64) is not None:
        yield partial(check_contraction, compressor)
    if compressor.unbiased:
        yield partial(check_unbiased, compressor)
    if compressor.allreducible:
        yield partial(check_linear, compressor)
    for framework in frameworks:
        yield partial(check_finite, compressor, framework)
        yield partial(check_shapes, compressor, framework)
        yield partial(check_dtypes, compressor, framework)
        yield partial(check_generator_untouched, compressor, framework)
