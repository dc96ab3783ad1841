"""benchmarks/adapters.py: both adapters do the same work, and the limit is held up."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SHAPES = [(60, 50), (50,), (50, 40), (), (30, 40)]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # it asks for one thread
    spec = importlib.util.spec_from_file_location(
        "adapters_benchmark", ROOT / "benchmarks" / "adapters.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_adapters_deliver_the_same_bits(benchmark):
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=shape).astype(np.float32) for shape in SHAPES]
    for method in benchmark.METHODS:
        given = {}
        for name, make in benchmark.ADAPTERS.items():
            step, refill = make(method, gradients)
            given[name] = []
            for _ in range(3):
                refill()
                given[name] += [direction.tobytes() for direction in step()]
        assert given["torch"] == given["tensorflow"], method
        assert len(given["torch"]) == 3 * len(SHAPES)


@pytest.mark.parametrize(("tensorflow", "code"), [(1.4, 0), (1.6, 1)])
def test_the_limit_decides_the_exit_code(
    benchmark, monkeypatch, capsys, tmp_path, tensorflow, code
):
    def measure(shapes, method, repeat):
        return {"torch": [1.0] * repeat, "tensorflow": [tensorflow] * repeat}

    monkeypatch.setattr(benchmark, "measure", measure)
    out = tmp_path / "times.json"
    assert benchmark.main(["--check", "--repeat", "3", "--json", str(out)]) == code
    shown = capsys.readouterr().out
    assert ("MISSED" in shown) == bool(code)
    assert len(json.loads(out.read_text())) == len(benchmark.MODELS) * len(benchmark.METHODS)


def test_the_model_is_a_resnet_50(benchmark):
    assert len(benchmark.MODELS["ResNet-50"]) == 161
    assert sum(np.prod(shape) for shape in benchmark.MODELS["ResNet-50"]) == 25_557_032
