"""The documentation's site: nothing public is missing in it, and its build is strict."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs" / "site"))

import reference  # noqa: E402

LINES = [
    line
    for page in sorted(ROOT.glob("docs/reference/*.md"))
    for block in re.findall(r"^```\{public\}\n(.*?)^```$", page.read_text(), re.S | re.M)
    for line in block.splitlines()
]
SHOWN = [name for line in LINES for name in reference.named(line)]


@pytest.mark.parametrize("module", ["ef_horovod", *reference.MODULES])
def test_every_public_name_stands_on_one_page(module):
    names = reference.exports(module)
    assert names
    assert {name: SHOWN.count(name) for name in names} == dict.fromkeys(names, 1)


@pytest.mark.parametrize("line", LINES)
def test_every_public_name_has_a_docstring(line):
    names = reference.named(line)
    assert names, "the line stands for nothing"
    missing = [each for name in names for each in reference.undocumented(name)]
    assert not missing, f"{missing} have no docstring, expected one that says what they do"


def test_what_is_read_is_what_is_there():
    """Reading the source finds the same names as importing, and their methods."""
    import ef_horovod as ef

    read = {name.rpartition(".")[2] for name in reference.exports("ef_horovod")}
    assert read | {"cost", "theory"} >= {n for n in ef.__all__ if n in vars(ef)}
    assert {"TopK", "EF21", "DoubleSqueeze"} <= read
    compressor = reference.members(reference.at("ef_horovod.Compressor"))
    assert {"compress", "encode", "allreducible", "examples"} <= compressor.keys()
    wrapped = reference.members(reference.at("ef_horovod.torch.typed.WrappedOptimizer"))
    assert {"synchronize", "stats"} <= wrapped.keys(), "of its private base"


@pytest.mark.slow
def test_a_broken_link_a_page_left_out_and_a_missing_docstring_fail_the_build(tmp_path):
    for folder in ("docs", "ef_horovod"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skip)
    for file in [*ROOT.glob("*.md"), ROOT / "setup.cfg"]:
        shutil.copy(file, tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    program = "tests/parallel/programs/checksummed_exchange.py"
    (tmp_path / program).parent.mkdir(parents=True)
    shutil.copy(ROOT / program, tmp_path / program)

    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-c", "docs/site", ".", "build/site"]

    def build() -> tuple[int, str]:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stderr

    assert build() == (0, "")
    for page in (tmp_path / "build" / "site").rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]* (?:src|href)="([^"]*)"', page.read_text())
        assert not [address for address in loaded if "//" in address], "a page loads from elsewhere"
    (tmp_path / "docs" / "gpu.md").write_text("# GPU\n\n[a](gone.md) [b](server.md#gone)\n")
    (tmp_path / "docs" / "more.md").write_text("# More\n")
    theory = tmp_path / "docs" / "reference" / "theory.md"
    theory.write_text(theory.read_text().replace("ef_horovod.theory\n", "ef_horovod.theory.xi\n"))
    source = tmp_path / "ef_horovod" / "theory" / "steps.py"
    text = re.sub(r'(def xi\([^\n]*\n    )""".*?"""', r"\1", source.read_text(), flags=re.S)
    source.write_text(text)
    status, said = build()
    assert status != 0
    assert "docs/gpu.md:3: WARNING: 'myst' cross-reference target not found: 'gone.md'" in said
    assert "local id not found in doc 'docs/server': 'gone'" in said
    assert "docs/more.md: WARNING: document isn't included in any toctree" in said
    assert "ef_horovod.theory.xi has no docstring" in said
