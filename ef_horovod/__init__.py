"""Error-feedback gradient compression for Horovod and MPI: the core, on NumPy arrays.

    >>> import ef_horovod as ef, numpy
    >>> payload = ef.TopK(ratio=0.01).compress(numpy.random.default_rng(0).normal(size=10_000))
    >>> payload.nbytes < 80_000 / 100
    True

Compressors and methods register themselves and become attributes of this module. Training scripts
import `ef_horovod.torch`. This module needs only NumPy. Frameworks, MPI and Numba are imported at
their first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from ef_horovod import compressors, methods  # noqa: F401 - registers them
from ef_horovod.arrays.keys import Key
from ef_horovod.common.schedules import Decay, Exponential, Linear, Piecewise, Schedule
from ef_horovod.compressors.base import Compressor, Payload
from ef_horovod.compressors.registry import COMPRESSORS
from ef_horovod.errors import (
    CollectiveTimeoutError,
    ConfigMismatchError,
    EFHorovodError,
    NonFiniteError,
    PayloadError,
    StateFileError,
    UnsupportedError,
)
from ef_horovod.methods.base import Method
from ef_horovod.methods.estimators import IGT, PAGE, ROOTSGD, STORM, Estimator
from ef_horovod.methods.registry import METHODS
from ef_horovod.simulation import Run, simulate

__version__ = "0.1.0"

__all__ = [
    "IGT",
    "PAGE",
    "ROOTSGD",
    "STORM",
    "CollectiveTimeoutError",
    "Compressor",
    "ConfigMismatchError",
    "Decay",
    "EFHorovodError",
    "Estimator",
    "Exponential",
    "Key",
    "Linear",
    "Method",
    "NonFiniteError",
    "Payload",
    "Piecewise",
    "PayloadError",
    "Run",
    "Schedule",
    "StateFileError",
    "UnsupportedError",
    "cost",
    "simulate",
    "theory",
    *COMPRESSORS,
    *METHODS,
]


def __getattr__(name: str) -> Any:
    if name in ("cost", "theory"):  # not needed for training
        return importlib.import_module(f"ef_horovod.{name}")
    registered = COMPRESSORS.get(name) or METHODS.get(name)
    if registered is None:
        raise AttributeError(f"module 'ef_horovod' has no attribute {name!r}")
    return registered


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
