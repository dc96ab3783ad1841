"""benchmarks/compress.py: contenders do the same work, limits are held up, times are written."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ef_horovod as ef
from ef_horovod.compressors.registry import COMPRESSORS
from ef_horovod.methods.registry import METHODS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "compress.py"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # it asks for one thread
    spec = importlib.util.spec_from_file_location("compress_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_steps(contenders, steps=4, n=5003):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        source = rng.normal(size=n).astype(np.float32)
        for contender in contenders:
            contender.refill(source)
            contender.step()
            yield contender
            contender.settle()


def test_torch_top_k_step_leaves_the_same_error(benchmark):
    x = np.zeros(5003, np.float32)
    theirs = benchmark.TorchTopK(x.copy())
    ours = benchmark.Feedback(ef.ErrorFeedback(ef.TopK(benchmark.RATIO)), x.copy())
    for contender in run_steps([theirs, ours]):
        if contender is ours:
            np.testing.assert_array_equal(ours.worker.error, theirs.error.numpy())
            indices, values = theirs.message
            sent = torch.zeros(5003).index_put_((indices,), values)
            np.testing.assert_array_equal(ours.message.decompress(), sent.numpy())


def test_torch_one_bit_step_sends_the_same_bits(benchmark):
    x = np.zeros(5003, np.float32)
    theirs = benchmark.TorchOneBit(x.copy())
    ours = benchmark.Feedback(ef.ErrorFeedback(ef.OneBit()), x.copy())
    for contender in run_steps([theirs, ours]):
        if contender is ours:
            np.testing.assert_allclose(ours.worker.error, theirs.error.numpy(), atol=1e-5)
            assert ours.message.data[20:].tobytes() == theirs.message[1].numpy().tobytes()


def test_ef21_steps_track_the_gradient(benchmark):
    ours = benchmark.Feedback(ef.EF21(ef.Identity()), np.zeros(5003, np.float32))
    *_, last = run_steps([ours], steps=2)
    np.testing.assert_allclose(last.worker.tracked, np.random.default_rng(0).normal(
        size=(2, 5003))[1].astype(np.float32), atol=1e-6)  # fmt: skip


def test_limits(benchmark, capsys):
    slow = {benchmark.TORCH_TOP_K: 8.0, benchmark.TORCH_ONE_BIT: 3.0, benchmark.BASE: 0.25}
    codes = [benchmark.CodedSet(0.1, 5.6, 5.0, 15.0, 15.0, 15.0, 15.0)]
    good = slow | {benchmark.TOP_K: 1.0, benchmark.ONE_BIT: 1.0, benchmark.CODED: 1.2}
    assert benchmark.hold_limits(good, codes)
    assert "MISSED" not in capsys.readouterr().out
    for name in ("bits", "encode", "decode", "encode_clustered", "decode_clustered"):
        worse = codes[0]._replace(**{name: getattr(codes[0], name) + 0.1})
        assert not benchmark.hold_limits(good, [*codes, worse])
        assert capsys.readouterr().out.count("MISSED") == 1
    for changed in (
        {benchmark.TOP_K: 1.01},
        {benchmark.ONE_BIT: 1.01},
        {benchmark.CODED: 1.21},
        {benchmark.BASE: 0.24},
        {benchmark.TORCH_TOP_K: 7.9},
    ):
        assert not benchmark.hold_limits(good | changed, codes)
        assert "MISSED" in capsys.readouterr().out


def test_table_and_times(tmp_path):
    out = tmp_path / "times.json"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--n", "100000", "--repeat", "3", "--json", str(out)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    report = json.loads(out.read_text())
    assert report["n"] == 100_000
    assert report["indices"] == 1000
    assert len(report["seconds"]) == 10
    for name, seconds in report["seconds"].items():
        assert name in run.stdout
        assert len(seconds) == 3
        assert min(seconds) > 0
    assert run.stdout.count("allowed") == 6
    assert [row["density"] for row in report["index_sets"]] == [0.03, 0.1]
    for row in report["index_sets"]:
        assert 1 < row["bits"] / row["entropy"] < 1.13
        assert f"{row['bits'] / row['entropy']:.3f}" in run.stdout
        assert min(row.values()) > 0
    methods = {row["method"]: row for row in report["registered"]}
    for kind in COMPRESSORS.values():
        for example in kind.examples():
            row = methods[repr(ef.NoFeedback(example))]
            assert row["method"] in run.stdout
            assert row["steps"] == 3
            if example.fixed_size and row["exchange"] == "gather":
                assert row["bytes_out"] == 3 * example.nbytes(100_000)
    for name in METHODS:
        assert any(method.startswith(f"{name}(") for method in methods)
    assert methods["NoFeedback(TopK(k=3))"]["relative_error"] > 0.99
