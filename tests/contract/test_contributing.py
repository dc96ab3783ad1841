"""The worked examples of CONTRIBUTING.md work."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from pages import python_blocks

import ef_horovod as ef
from ef_horovod.compressors.registry import COMPRESSORS
from ef_horovod.testing import check_compressor


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_classes: None) -> list[str]:
    """The Python blocks; modules made of them, and what they register, end with the test."""
    monkeypatch.syspath_prepend(tmp_path)
    found = python_blocks("CONTRIBUTING.md")
    assert len(found) == 4
    for i, text in enumerate(found):
        (tmp_path / f"contributed{i}.py").write_text(text)
        monkeypatch.delitem(sys.modules, f"contributed{i}", raising=False)
    return found


def test_compressor_keeps_the_contract(blocks: list[str]) -> None:
    module = importlib.import_module("contributed0")
    assert COMPRESSORS["Window"] is module.Window
    for example in module.Window.examples():
        check_compressor(example, frameworks=("numpy", "torch"))
    exec(blocks[1], {"Window": module.Window})


def test_method_converges_and_keeps_the_contract(blocks: list[str]) -> None:
    module = importlib.import_module("contributed2")
    method = module.FadingErrorFeedback(ef.TopK(k=2))
    targets = np.random.default_rng(0).normal(size=(3, 6))
    run = ef.simulate(
        method, lambda i, x, t: x - targets[i], np.zeros(6), workers=3, steps=300, step_size=0.05
    )
    assert np.linalg.norm(run.x - targets.mean(0)) < 0.3 * np.linalg.norm(targets.mean(0))
    exec(blocks[3], {"FadingErrorFeedback": module.FadingErrorFeedback})
