"""A package of its own, made of CONTRIBUTING.md's blocks, is extended to all that is checked.

Nothing is installed and no file of the project is edited: what follows runs in processes that find
the package by PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from pages import ROOT, python_blocks
from processes import run_job

pytestmark = pytest.mark.slow

INIT = '''"""A package of somebody else: every module registers what it defines."""

from ef_horovod.common.registry import import_all

import_all(__name__, __path__)
'''
SUITE = '''"""The project's contract checks, one test each, on what this package registers."""

import acme_compression
import pytest

import ef_horovod as ef
from ef_horovod.compressors.registry import COMPRESSORS
from ef_horovod.methods.registry import METHODS
from ef_horovod.testing import each_check, each_method_check
from ef_horovod.testing.frameworks import check_frameworks

FRAMEWORKS = ("numpy", "torch")
MINE = [kind for table in (COMPRESSORS, METHODS) for kind in table.values()
        if kind.__module__.startswith("acme_compression.")]
COMPRESSORS = [c for kind in MINE if hasattr(kind, "wire_id") for c in kind.examples()]
METHODS = [m for kind in MINE if not hasattr(kind, "wire_id")
           for c in (ef.TopK(ratio=0.1), *COMPRESSORS) for m in kind.examples(c)]


def test_both_are_there():
    assert {kind.__name__ for kind in MINE} == {"Window", "FadingErrorFeedback"}
    assert ef.Window is MINE[0]
    assert ef.EF21(ef.Window(0.1)).compressor == ef.Window(0.1)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_compressor(compressor):
    for check in each_check(compressor, FRAMEWORKS):
        check()


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_method(method):
    for check in each_method_check(method, FRAMEWORKS):
        check()
    check_frameworks(method, ("torch",))
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the package and its tests."""
    folder = tmp_path_factory.mktemp("outside")
    compressor, check_of_compressor, method, check_of_method = python_blocks("CONTRIBUTING.md")
    package = folder / "acme_compression"
    package.mkdir()
    (package / "__init__.py").write_text(INIT)
    (package / "window.py").write_text(compressor)
    (package / "fading.py").write_text(method)
    (folder / "test_acme.py").write_text(SUITE)
    (folder / "as_written.py").write_text(
        "from acme_compression.fading import FadingErrorFeedback\n"
        f"from acme_compression.window import Window\n{check_of_compressor}\n{check_of_method}"
    )
    return folder


def run(folder: Path, *words: str | Path) -> str:
    path = os.pathsep.join((str(folder), str(ROOT)))
    command = [sys.executable, *map(str, words)]
    return run_job(command, cwd=folder, environment={"PYTHONPATH": path})


def test_the_contract_suite_takes_its_classes(folder):
    output = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_acme.py")
    assert "6 passed" in output, output  # 2 compressors, 3 methods, and that they are there
    run(folder, "as_written.py")


def test_the_table_of_the_documentation_lists_them(folder):
    output = run(folder, "-m", "ef_horovod", "list", "--markdown", "--import", "acme_compression")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines()]
    assert ["Window(ratio=0.1)", "400,024", "1/10.0", "0.1", "-", "no", "yes", "reduce"] in rows
    assert ["FadingErrorFeedback(TopK(ratio=0.01))", "50,723", "4,000,000", "1 + 0", "0 + 1",
            "gather"] in rows  # fmt: skip
    words = {row[0]: row[1:] for row in rows if row}
    assert words["Window"][1] == "uint32 start, uint32 k, then k float32 values."
    assert words["FadingErrorFeedback"][0] == "p = g + fading \\* e; send C(p); e = p - C(p)."


def test_the_benchmark_has_rows_for_them(folder):
    times = folder / "times.json"
    output = run(
        folder,
        *(ROOT / "benchmarks" / "compress.py", "--n", "100000", "--repeat", "1"),
        *("--json", times, "--import", "acme_compression"),
    )
    rows = {row["method"]: row for row in json.loads(times.read_text())["registered"]}
    sent = {name: row["bytes_out"] for name, row in rows.items()}
    for name in ("NoFeedback(Window(ratio=0.1))", "FadingErrorFeedback(TopK(ratio=0.01))"):
        assert name in output
        assert rows[name]["seconds_compress"] > 0
    assert sent["NoFeedback(Window(ratio=0.1))"] == 40_000  # two ranks sum 10,000 float32
    feedback = "ErrorFeedback(TopK(ratio=0.01))"
    assert sent[f"Fading{feedback}"] == sent[feedback]
