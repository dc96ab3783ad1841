"""benchmarks/selection.py: a small tensor with a large gradient, in a bucket and by itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import ef_horovod as ef

torch = pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]
METHOD = ef.EF21(ef.TopK(ratio=0.05))


@pytest.fixture(scope="module")
def benchmark():
    path = ROOT / "benchmarks" / "selection.py"
    spec = importlib.util.spec_from_file_location("selection_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_bucket_sends_the_large_entries_of_a_small_tensor(benchmark) -> None:
    random = np.random.default_rng(0)
    named = [(name, torch.zeros(size)) for name, size in (("small", 20), ("large", 980))]
    scales = {"small": 100.0, "large": 1.0}
    gradients = [
        {n: scales[n] * random.standard_normal(p.numel()).astype(np.float32) for n, p in named}
        for _ in range(benchmark.WORKERS)
    ]
    whole = benchmark.Selection("bucket.0", named, METHOD).step(0, gradients)
    apart = {}
    for i, one in enumerate(named):
        apart |= benchmark.Selection(f"bucket.{i}", [one], METHOD).step(0, gradients)
    assert whole["small"] < 0.1 < 0.5 < apart["small"]
    assert apart["large"] < whole["large"] < 1


def test_ways_train_on_equal_batches(benchmark) -> None:
    def losses(method: ef.Method | None, whole: bool) -> float:
        return benchmark.train(method, whole, lambda name, p: False, 0.1, 2, seed=0).loss

    everything = ef.EF21(ef.TopK(ratio=1.0))
    dense = losses(None, True)
    assert losses(everything, True) == pytest.approx(dense, rel=1e-5)
    assert losses(everything, False) == pytest.approx(dense, rel=1e-5)
