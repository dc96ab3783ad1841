"""benchmarks/memory.py: what its table says of peaks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from ef_horovod.methods.parsing import read_method

FILE = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_memory", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peaks(once, vectors):
    sizes = (6_000_000, 24_000_000)
    return [{"peak": int(once + 4 * d * (5 + vectors)), "parameters": d} for d in sizes]


def test_vectors_are_told_from_what_is_taken_once(benchmark):
    text = benchmark.table({benchmark.DENSE: peaks(3e8, 0), "EF21, top-k 1 %": peaks(4e8, 4)})
    dense, ef21 = (line.split() for line in text.splitlines()[-2:])
    assert dense[-3:] == ["780", "0.0", "0"]
    assert ef21[-3:] == ["1,264", "4.0", "100"]


def test_ways_can_be_read(benchmark):
    for method, wrapper, _ in [*benchmark.WAYS.values()][1:]:
        assert wrapper in ("CompressedUpdates", "DistributedOptimizer")
        assert read_method(method)
