"""benchmarks/fuzz.py: a short run, and that it notices a reader that raises something else."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"


@pytest.fixture
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_changed_bytes_and_texts_are_read_or_refused(fuzz):
    counts = fuzz.tried(60, seed=0, most=50)
    assert set(counts) == {"payloads", "messages", "state files", "texts"}
    assert min(counts.values()) >= 1000


def test_another_exception_ends_the_run_with_the_seed_and_the_bytes(fuzz, monkeypatch):
    def read(data):
        raise KeyError("no such place")

    monkeypatch.setattr(fuzz, "readers", lambda: [("payloads", [b"1234"], read)])
    with pytest.raises(AssertionError, match=r"seed 3, payloads: KeyError.* for [0-9a-f]*$"):
        fuzz.tried(60, seed=3, most=50)
