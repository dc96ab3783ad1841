"""Ready policies for `dense=`: by name, by size, and by the bytes that compression saves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from ef_horovod.common.options import whole
from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.training.policy import DensePolicy, Parameter, require_method, small_or_vector

_WORDS = {"dense": True, "compressed": False}


def by_name(
    patterns: Mapping[str, str | Method], otherwise: DensePolicy = small_or_vector
) -> DensePolicy:
    """A policy that goes by the names of parameters; the first pattern that fits decides.

    Args:
        patterns: {pattern: "dense", "compressed" (by the optimizer's method), or another method}.
            `*` stands for any text, `?` for one character, `[ab]` for one of some, as in `fnmatch`.
            Names are those of `named_parameters()`, in TensorFlow the paths of variables, with or
            without their ":0". Rank 0 warns of a pattern that fits no name.
        otherwise: for names that fit no pattern.

    Raises:
        UnsupportedError: a pattern stands for something else, or is no text.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> policy = by_name({"*embed*": "dense", "head.*": ef.EF21(ef.TopK(0.1))})
        >>> table = numpy.zeros((100, 50))
        >>> policy("embedding.weight", table), policy("head.weight", table), policy("0.w", table)
        (True, EF21(TopK(ratio=0.1)), False)
    """
    way_out = "write for example {'*.embed*': 'dense', 'head.*': EF21(TopK(0.1))}"
    if not isinstance(patterns, Mapping) or not all(isinstance(p, str) for p in patterns):
        raise UnsupportedError(
            f"by_name got {patterns!r}, expected a dict from patterns of names to answers; "
            f"{way_out}"
        )
    _require_policy("by_name", otherwise)
    for pattern, answer in patterns.items():
        if not (isinstance(answer, Method) or (isinstance(answer, str) and answer in _WORDS)):
            raise UnsupportedError(
                f"by_name got {answer!r} for {pattern!r}, expected 'dense', 'compressed' or a "
                f"method; {way_out}"
            )
    return _ByName(dict(patterns), otherwise)


def _require_policy(owner: str, otherwise: DensePolicy) -> None:
    if not callable(otherwise):
        raise UnsupportedError(
            f"{owner} got otherwise={otherwise!r}, expected a function of a name and a parameter; "
            "write otherwise=ef.dense_below(1024), or leave it out"
        )


class _ByName:
    """The policy of `by_name`."""

    def __init__(self, patterns: dict[str, str | Method], otherwise: DensePolicy) -> None:
        self._patterns, self._otherwise = patterns, otherwise

    def __call__(self, name: str, parameter: Parameter) -> bool | Method:
        for pattern, answer in self._patterns.items():
            if _fits(pattern, name):
                return answer if isinstance(answer, Method) else _WORDS[answer]
        return self._otherwise(name, parameter)

    def unused(self, names: Sequence[str]) -> list[str]:
        """The patterns that fit none of the names; for `warn_of_surprises`."""
        return [p for p in self._patterns if not any(_fits(p, name) for name in names)]


def _fits(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(":0"), pattern)


def dense_below(elements: int) -> DensePolicy:
    """A policy that keeps parameters of fewer elements uncompressed, and compresses all others.

    Raises:
        ValueError: `elements` is no whole number.

    Example:
        >>> import numpy
        >>> dense_below(100)("bias", numpy.zeros(99)), dense_below(100)("bias", numpy.zeros(100))
        (True, False)
    """
    whole("dense_below", "elements", elements, 0, None, "0 compresses all parameters")
    return lambda name, parameter: math.prod(parameter.shape) < elements


def dense_unless_smaller(method: Method, otherwise: DensePolicy = small_or_vector) -> DensePolicy:
    """A policy that keeps a parameter uncompressed if its payload is not smaller than float32.

    The payload is that of the parameter alone. In a bucket, `TopK(k=1000)` keeps 1000 entries of
    all its parameters together.

    Args:
        method: of the optimizer. Of a compressor whose payloads vary in size, the smallest counts;
            of a schedule, the final value.
        otherwise: for the other parameters.

    Raises:
        UnsupportedError: `method` is not a method.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> policy = dense_unless_smaller(ef.EF21(ef.TopK(k=1000)), dense_below(0))
        >>> policy("w", numpy.zeros((30, 30))), policy("w", numpy.zeros((300, 300)))
        (True, False)
    """
    require_method(method)
    _require_policy("dense_unless_smaller", otherwise)

    def policy(name: str, parameter: Parameter) -> bool | Method:
        d, own = math.prod(parameter.shape), method.for_shapes([tuple(parameter.shape)])
        lengths = [own.message_length(d, step) for step in (0, 1)]
        if sum(own.compressor.nbytes(length) for length in lengths) / 2 >= 4 * d:
            return True
        return otherwise(name, parameter)

    return policy
