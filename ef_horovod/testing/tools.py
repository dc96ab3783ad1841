"""Shared by the checks: inputs, conversions between frameworks, and `require`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from ef_horovod.arrays import Array, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.compressors.base import Compressor
from ef_horovod.methods.base import Method

LENGTHS = (0, 1, 7, 8, 9, 4099)
KEY = Key(seed=11, step=5, tensor=3, rank=1)
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
ROUNDING = 2.0**-21  # a few roundings to float32


def require(condition: Any, checked: Compressor | Method, message: str) -> None:
    if not condition:  # not `assert`: the checks also hold under python -O
        raise AssertionError(f"{checked!r} {message}")


def vectors(d: int) -> Iterator[np.ndarray]:
    """float32[d] with hard cases for compressors: spread, ties, tiny and huge numbers."""
    rng = np.random.default_rng(d)
    yield rng.normal(size=d).astype(np.float32)
    yield (rng.normal(size=d) ** 5).astype(np.float32)  # a few entries hold most of the norm
    yield rng.integers(-2, 3, size=d).astype(np.float32)  # ties, and positive zeros
    yield np.where(np.arange(d) % 3, np.float32(-0.0), np.float32(1.5))  # negative zeros
    yield (np.arange(d) == d // 2).astype(np.float32)
    yield (rng.normal(size=d) * 1e-43).astype(np.float32)  # denormals
    yield (rng.normal(size=d) * 1e30).astype(np.float32)


def is_deterministic(compressor: Compressor, x: np.ndarray) -> bool:
    """Whether the key changes neither C(x) nor C(noise); for x alone, draws may agree by chance."""
    return not _draws(compressor) and _indifferent(compressor, x)


@lru_cache
def _draws(compressor: Compressor) -> bool:
    noise = np.random.default_rng(0).standard_normal(64, np.float32)
    return not _indifferent(compressor, noise)


def _indifferent(compressor: Compressor, x: np.ndarray) -> bool:
    sent = {bytes(compressor.compress(x, Key(seed=s, step=s, rank=s))) for s in range(8)}
    return len(sent) == 1


def array_of(framework: str, x: np.ndarray) -> Array:
    """A framework's array with a copy of x of the same shape; "torch:cuda" for a GPU."""
    x = np.array(x, order="C")
    name, _, device = framework.partition(":")
    xp = importlib.import_module(f"ef_horovod.arrays.{name}")
    return xp.from_host(x, device or None)


def framework_of(x: Array) -> str:
    """ "numpy", "torch" or "tensorflow"."""
    return namespace(x).__name__.rpartition(".")[2]


def cast(x: Array, dtype: str) -> Array:
    if isinstance(x, np.ndarray):
        return x.astype(dtype)
    if type(x).__module__.startswith("tensorflow"):
        return importlib.import_module("tensorflow").cast(x, dtype)
    return x.to(getattr(importlib.import_module("torch"), dtype))


def host(x: Array) -> np.ndarray:
    return namespace(x).to_host(x)


def bits(x: Array) -> bytes:
    return host(x).tobytes()


def norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.astype(float)))
