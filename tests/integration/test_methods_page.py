"""docs/methods.md: its expressions are ones of this library, its blocks run and hold."""

from __future__ import annotations

import re

import pytest
from pages import ROOT, python_blocks, run_in_order

import ef_horovod as ef
from ef_horovod.methods.registry import METHODS

PAGE = "docs/methods.md"
BLOCKS = python_blocks(PAGE)
ALONE = [block for block in BLOCKS if "horovod.torch" not in block]


def section(title):
    """The lines of a section of the page."""
    text = (ROOT / PAGE).read_text()
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0].splitlines()


def expressions():
    """(paper's name, expression) of the table; those after "estimator" too."""
    rows = [line.split(" | ") for line in section("From a paper's name to an expression")]
    return [
        (cells[0].lstrip("| "), found)
        for cells in rows
        if len(cells) == 2
        for found in re.findall(r"`([A-Z][^`]*)`", cells[1])
    ]


@pytest.mark.slow
def test_the_blocks_run_in_order_and_what_they_assert_holds():
    assert len(BLOCKS) == len(ALONE) + 1
    assert all("assert " in block for block in BLOCKS)
    names = run_in_order(ALONE, PAGE)
    assert names["stalls"] > names["floor"]


@pytest.mark.parametrize(("name", "expression"), expressions(), ids=[e for _, e in expressions()])
def test_an_expression_is_one_of_this_library(name, expression):
    made = eval(expression, {kind: getattr(ef, kind) for kind in ef.__all__})
    assert isinstance(made, ef.Method | ef.Estimator), name


def test_every_method_has_a_section_and_a_row():
    text = (ROOT / PAGE).read_text()
    table = {expression.partition("(")[0] for _, expression in expressions()}
    assert len(expressions()) > 30
    for name in METHODS:
        assert f"\n## {name}\n" in text, f"docs/methods.md has no section on {name}"
        assert name in table, f"docs/methods.md names no paper's algorithm for {name}"


def test_links_inside_the_page_and_to_others_lead_somewhere():
    text = (ROOT / PAGE).read_text()
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / "docs" / path).exists(), target
        assert path or anchor in anchors, target
