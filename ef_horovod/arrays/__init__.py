"""Which framework an array belongs to, found without importing any.

`namespace(x)` returns the module with the closed list of functions that compressors and methods
may use: `arrays/numpy.py`, `arrays/torch.py`, `arrays/tensorflow.py`. They hold the only framework
knowledge below the adapters. Kernels work on flat, contiguous float32 arrays; what goes to or comes
from the wire (indices, kept values, packed bits) lies in NumPy arrays on the host.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

Array = Any  # numpy.ndarray, torch.Tensor, tensorflow.Tensor or tensorflow.Variable
_SUPPORTED = ("numpy", "torch", "tensorflow")
_NAMES = ("ndarray", "Tensor", "Variable")


def namespace(x: Array) -> ModuleType:
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


def dtype_name(x: Array) -> str:
    """x's dtype in the words that all frameworks share: "float32", "bfloat16"."""
    return str(x.dtype).removeprefix("torch.").removeprefix("<dtype: '").removesuffix("'>")


@cache
def _namespace_of(kind: type) -> ModuleType:
    for base in kind.__mro__:
        framework = base.__module__.partition(".")[0]
        if framework == "keras" and base.__name__ == "Variable":  # wraps its backend's
            raise TypeError(
                f"got a {kind.__module__}.{kind.__qualname__}, expected the variable or tensor "
                "inside it; pass variable.value"
            )
        if framework in _SUPPORTED and base.__name__ in _NAMES:
            return importlib.import_module(f"ef_horovod.arrays.{framework}")
    raise TypeError(
        f"got {kind.__module__}.{kind.__qualname__}, expected a NumPy array, a torch or a "
        "TensorFlow tensor; convert it first, for example with numpy.asarray(x, dtype='float32')"
    )
