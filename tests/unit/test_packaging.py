"""What a source distribution holds, and what an index page would show of it."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = (
    *("benchmarks", "docker", "docs", "ef_horovod", "examples", "experiments", "launch", "tests"),
    ".ci",
)
FILES = ("LICENSE", "MANIFEST.in", "pyproject.toml", "setup.cfg", ".dockerignore", ".gitignore")
SITE = "docker/site/pip/site.crt"  # what a place adds to its images
_BUILD = "import setuptools.build_meta as build; print(build.build_sdist('dist'))"


def project_files(root: Path) -> set[str]:
    """Files of the project below a folder, and not what tools leave there."""
    found = {str(file.relative_to(root)) for file in root.iterdir() if file.is_file()}
    for folder in FOLDERS:
        files = (file for file in (root / folder).rglob("*") if file.is_file())
        found |= {str(file.relative_to(root)) for file in files if "__pycache__" not in file.parts}
    return {name for name in found if not name.startswith("docker/site") or ".git" in name}


@pytest.fixture(scope="module")
def source_distribution(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[set[str], set[str], dict[str, str]]:
    """Files of a copy of this project; names in its source distribution; texts that describe it."""
    copy = tmp_path_factory.mktemp("copy") / "project"
    copy.mkdir()
    for name in FOLDERS:
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    for file in [*ROOT.glob("*.md"), *(ROOT / name for name in FILES)]:
        shutil.copy(file, copy)
    expected = project_files(copy)
    (copy / SITE).write_text("a certificate")
    done = subprocess.run(
        [sys.executable, "-c", _BUILD], cwd=copy, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(copy / "dist" / done.stdout.splitlines()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        (top,) = {name.partition("/")[0] for name in archive.getnames()}
        texts = {}
        for name in ("PKG-INFO", "ef_horovod.egg-info/top_level.txt"):
            file = archive.extractfile(f"{top}/{name}")
            assert file is not None
            texts[Path(name).name] = file.read().decode()
        return expected, names, texts


def test_a_source_distribution_has_all_files_of_the_project(source_distribution):
    expected, names, _ = source_distribution
    assert {"README.md", "docs/training.md", "tests/pages.py", "launch/demo"} <= expected
    assert expected - names == set()
    assert SITE not in names
    assert not [name for name in names if "__pycache__" in name]


def test_the_package_alone_is_installed(source_distribution):
    expected, _, texts = source_distribution
    assert "launch/virtual_cluster/network.py" in expected
    assert texts["top_level.txt"].split() == ["ef_horovod"]


def test_an_index_page_shows_a_text_without_relative_links(source_distribution):
    metadata = source_distribution[2]["PKG-INFO"]
    text = (ROOT / "DESCRIPTION.md").read_text()
    assert text.strip() in metadata
    assert re.findall(r"\]\((?!https?://)", text) == []


def test_the_description_shows_the_first_example_of_the_readme():
    (example,) = re.findall(
        r"^```diff\n.*?^```$", (ROOT / "DESCRIPTION.md").read_text(), re.S | re.M
    )
    assert example in (ROOT / "README.md").read_text()


def test_no_address_of_the_project_is_made_up():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert not {"url", "project_urls", "download_url"} & set(settings["metadata"])
