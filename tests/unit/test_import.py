"""Importing the package is quick and loads no framework; the examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import pkgutil
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import ef_horovod

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "tensorflow", "keras", "mpi4py", "numba", "horovod", "matplotlib", "tqdm"}
REPORT = """
import json, sys, time
begin = time.perf_counter()
import {module}
seconds = time.perf_counter() - begin
print(json.dumps([seconds, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""
# What needs more than NumPy and torch to be imported is left to the tests of the adapters.
NEEDS_MORE = (
    "ef_horovod.torch",
    "ef_horovod.transports.horovod",
    "ef_horovod.transports.mpi",
    *(f"ef_horovod.server.{name}" for name in ("client", "inbox", "link", "server", "worker")),
)


def measure_import(module, path=ROOT):
    """(seconds, top-level modules loaded) of an import in a fresh process."""
    run = subprocess.run(
        [sys.executable, "-c", REPORT.format(module=module)],
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    seconds, modules = json.loads(run.stdout)
    return seconds, set(modules)


def assert_light(module, path=ROOT):
    runs = [measure_import(module, path) for _ in range(5)]
    loaded = runs[0][1] & HEAVY
    assert not loaded, f"import {module} loads {sorted(loaded)}"
    seconds = statistics.median(seconds for seconds, _ in runs)
    assert seconds < 1.0, f"import {module} takes {seconds:.2f} s"


def test_import_is_light():
    assert_light("ef_horovod")


def test_a_heavy_import_is_noticed(tmp_path):
    """The check above can fail, on either count."""
    (tmp_path / "heavy.py").write_text("import numba\n")
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(1.1)\n")
    with pytest.raises(AssertionError, match="import heavy loads .*numba"):
        assert_light("heavy", tmp_path)
    with pytest.raises(AssertionError, match="import slow takes"):
        assert_light("slow", tmp_path)


def test_everything_public_is_there():
    for name in ef_horovod.__all__:
        assert getattr(ef_horovod, name) is not None
        assert name in dir(ef_horovod)
    with pytest.raises(AttributeError, match="has no attribute 'TopQ'"):
        ef_horovod.TopQ  # noqa: B018


def modules():
    found = pkgutil.walk_packages(ef_horovod.__path__, "ef_horovod.", onerror=lambda name: None)
    names = [module.name for module in found if not module.name.startswith(NEEDS_MORE)]
    return ["ef_horovod", *names]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(name), verbose=False)
    assert results.failed == 0


def test_no_example_stands_where_none_is_run():
    package = ROOT / "ef_horovod"
    with_examples = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in package.rglob("*.py")
        if re.search(r"^ *>>> ", file.read_text(), re.MULTILINE)
    }
    assert len(with_examples) > 50
    assert with_examples <= set(modules())


def test_docstring_examples_are_found():
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [t for name in modules() for t in finder.find(importlib.import_module(name), name)]
    with_examples = {test.name for test in tests if test.examples}
    assert len(with_examples) >= 15
    assert "ef_horovod.compressors.topk.TopK" in with_examples
