"""Links and anchors of all pages lead somewhere, and all Python blocks are run by tests."""

from __future__ import annotations

import re
from pathlib import Path

import pages
import pytest
from pages import PAGES, ROOT, python_blocks

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its blocks and snippets of code."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`(?!\])", "", text)


def anchors(page: Path) -> set[str]:
    """Names that GitHub gives to the headings of a page."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        base = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        name, number = base, 0
        while name in found:
            number += 1
            name = f"{base}-{number}"
        found.add(name)
    return found


def links(page: Path) -> list[str]:
    """Links of a page to files of this project and to its own headings."""
    return [link for link in _LINK.findall(prose(page)) if not re.match(r"\w+:", link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(page):
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_check_sees_a_broken_link_and_a_broken_anchor(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One, *two*: `x()`\n[a](#one-two-x) [b](#two) [c](gone.md)\n```\n# No\n```\n")
    assert links(page) == ["#one-two-x", "#two", "gone.md"]
    assert anchors(page) == {"one-two-x"}


def test_every_page_is_checked():
    assert {"README.md", "CONTRIBUTING.md", "training.md", "bandwidth.md"} <= {
        p.name for p in PAGES
    }


def languages(text: str) -> list[str]:
    """What stands behind the fences that open blocks of code."""
    return [found[2] for found in re.findall(r"^( *)(```+)(.*)\n(?:.*\n)*?\1\2$", text, re.M)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_says_its_language(page):
    known = {"python", "text", "sh", "diff", "{public}"}
    assert set(languages(page.read_text())) <= known


def test_every_python_block_is_run_by_a_test():
    with_blocks = {str(page.relative_to(ROOT)) for page in PAGES if python_blocks(page)}
    assert with_blocks == set(pages.RUN_BY), "say in tests/pages.py what runs the blocks of a page"
    for page, runners in pages.RUN_BY.items():
        for runner in runners:
            assert page in (ROOT / "tests" / runner).read_text(), f"{runner} does not run {page}"


def test_the_halves_of_a_page_are_the_page():
    page, middle = "docs/training.md", "## TensorFlow and Keras"
    halves = python_blocks(page, end=middle) + python_blocks(page, start=middle)
    assert halves == python_blocks(page)


def test_the_checks_see_all_blocks(tmp_path):
    page = tmp_path / "page.md"
    text = "```python\nx = 1\n```\n- a\n\n  ```python\n  y = 2\n  ```\n\n```\nz\n```\n```py\n```\n"
    page.write_text(text)
    assert languages(text) == ["python", "python", "", "py"]
    assert python_blocks(page) == ["x = 1\n", "y = 2\n"]


_NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def missing_tests(text: str) -> list[str]:
    """Tests that a text names by file and function, and that are not there."""
    missing = []
    for path, name in _NAMED_TEST.findall(text):
        file = ROOT / path
        if not file.is_file() or not re.search(rf"^def {name}\(", file.read_text(), re.MULTILINE):
            missing.append(f"{path}::{name}")
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_a_page_names_exist(page):
    text = page.read_text()
    assert not missing_tests(text)
    assert text.count(".py::") == len(_NAMED_TEST.findall(text)), "written so that none is checked"


def test_every_case_on_the_page_of_promises_names_a_test():
    text = (ROOT / "docs/promises.md").read_text()
    cases = text.split("\n## ")[2:]  # behind the introduction and the overview
    assert len(cases) >= 15
    assert not [case.partition("\n")[0] for case in cases if not _NAMED_TEST.search(case)]


def test_the_check_sees_a_test_that_is_gone():
    here = "tests/unit/test_documentation.py"
    names = [f"{here}::prose", f"{here}::pros", "tests/unit/test_gone.py::test_x"]
    assert missing_tests(" ".join(f"`{name}`" for name in names)) == names[1:]
