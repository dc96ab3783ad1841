"""Finds the framework of an array without importing any framework.

`namespace(x)` returns the module of array functions for x's framework: `arrays/numpy.py`,
`arrays/torch.py` or `arrays/tensorflow.py`. Compressors and methods use these functions only, so
nothing else below the adapters depends on a framework. Kernels work on flat, contiguous float32
arrays. Payload data (coded indices, kept values, packed bits) is in NumPy arrays on the host.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from ef_horovod.arrays.functions import Array, ArrayFunctions

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    # The array type that a function takes and returns; Any for type checkers by default.
    A = TypeVar("A", default=Any)
else:
    from typing import TypeVar

    A = TypeVar("A")

_SUPPORTED = ("numpy", "torch", "tensorflow")
_NAMES = ("ndarray", "Tensor", "Variable")


def namespace(x: Array) -> ArrayFunctions:
    """The array functions for x's framework.

    Args:
        x: array of a supported framework.

    Raises:
        TypeError: x is something else (a list, a scalar, another framework's array).

    Example:
        >>> import numpy
        >>> namespace(numpy.zeros(3)).__name__
        'ef_horovod.arrays.numpy'
    """
    return _namespace_of(type(x))  # type: ignore[arg-type, unused-ignore]


def float_namespace(x: Array, what: str = "an array") -> ArrayFunctions:
    """The array functions for x's framework, if x holds real floating-point numbers.

    Args:
        x: array of a supported framework.
        what: what x is, for error messages.

    Raises:
        TypeError: x is something else.
    """
    xp = namespace(x)
    if xp.is_float(x):
        return xp
    if "complex" in dtype_name(x):
        way_out = "send real and imaginary parts as real numbers, as torch.view_as_real has them"
    else:
        way_out = "other numbers have no gradient, so convert it first if that is meant"
    raise TypeError(f"got {what} of {x.dtype}, expected a real, floating-point one; {way_out}")


def require_writable(x: Array) -> None:
    """Raise unless kernels can change x in place.

    Raises:
        ValueError: x is not writable or not contiguous.
    """
    problem = namespace(x).why_not_writable(x)
    if problem:
        raise ValueError(
            f"got an array to add to that {problem}, expected one that can be changed in place, "
            "with its numbers side by side; add to a copy"
        )


def dtype_name(x: Array) -> str:
    """x's dtype as a name that is the same in all frameworks: "float32", "bfloat16"."""
    return _name_of_dtype(x.dtype)


@cache
def _name_of_dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.").removeprefix("<dtype: '").removesuffix("'>")


@cache
def _namespace_of(kind: type) -> ArrayFunctions:
    for base in kind.__mro__:
        framework = base.__module__.partition(".")[0]
        if framework == "keras" and base.__name__ == "Variable":  # wraps the backend's variable
            raise TypeError(
                f"got a {kind.__module__}.{kind.__qualname__}, expected the variable or tensor "
                "inside it; pass variable.value"
            )
        if framework in _SUPPORTED and base.__name__ in _NAMES:
            return cast(ArrayFunctions, importlib.import_module(f"ef_horovod.arrays.{framework}"))
        if framework == "numpy" and base.__name__ == "MaskedArray":
            raise TypeError(
                "got a numpy.ma.MaskedArray, expected an array without a mask, which would be "
                "lost; fill it first, for example with x.filled(0)"
            )
    raise TypeError(
        f"got {kind.__module__}.{kind.__qualname__}, expected a NumPy array, a torch or a "
        "TensorFlow tensor; convert it first, for example with numpy.asarray(x, dtype='float32')"
    )
