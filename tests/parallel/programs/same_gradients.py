"""The gradients of test_same_numbers.py: they follow from rank and step alone."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from ef_horovod import Identity, Method, NoFeedback
from ef_horovod.testing.pairs import every_method, selection

sys.path.append(str(Path(__file__).parents[2]))  # tests/, for sampling.py
from sampling import covering

SHAPE, SEED = (40, 30), 5  # enough elements for adapters to compress them
STEPS = 8  # memories that are reset in the seventh step are used once more
IN_SLICES = selection()


def gradient(rank: int, step: int) -> np.ndarray:
    """float32 of SHAPE."""
    return np.random.default_rng((rank, step)).standard_normal(SHAPE, np.float32)


def exchanges_of(method: Method) -> list[str]:
    """All that the method can travel by; by a double pass some dozens of methods, for the time."""
    in_slices = method.sliceable and method in IN_SLICES
    return [
        "gather",
        *["reduce"] * method.allreducible,
        *["dense"] * (method == NoFeedback(Identity())),
        *["double_pass"] * in_slices,
    ]


def methods_of_servers() -> list[Method]:
    """All but those that need dense steps, which servers do not have."""
    return [method for method in every_method() if not method.needs_dense_steps]


def dense_steps_of(method: Method) -> int:
    """A few for the methods that need some."""
    return 2 if method.needs_dense_steps else 0


def cases(every: bool) -> list[tuple[Method, str]]:
    """Methods and exchanges: all of them, or a sample with every pair of values."""
    product = [(method, exchange) for method in every_method() for exchange in exchanges_of(method)]
    return product if every else covering(product, _factors)


def _factors(case: tuple[Method, str]) -> tuple[str, str, str]:
    method, exchange = case
    return type(method).__name__, repr(method.compressor), exchange


def digest(x: np.ndarray) -> str:
    """Of all bits."""
    return hashlib.sha256(np.ascontiguousarray(x, np.float32).tobytes()).hexdigest()[:16]
