"""Our sentence stands below the traceback of an error that quotes it, and nowhere else."""

from __future__ import annotations

import subprocess
import sys

import pytest

_BEFORE = """
from ef_horovod.transports.timeouts import last_words
last_words.remember("got 1, expected 2; take 2")
"""


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("Graph: UnsupportedError: got 1, expected 2; take 2\\n  in node 7", True),
        ("another error", False),
    ],
)
def test_the_sentence_is_the_last_line_of_an_error_that_quotes_it(raised: str, said: bool) -> None:
    lines = stderr_of(f"{_BEFORE}\nraise RuntimeError('{raised}')")
    assert (lines[-1] == "ef_horovod: got 1, expected 2; take 2") == said
    assert any(line.startswith("RuntimeError: ") for line in lines), "the error itself is missing"


def test_the_cause_of_the_end_is_said_below_whatever_error() -> None:
    """And what is remembered after it follows from it."""
    code = f"""{_BEFORE}
last_words.remember("rank 0 waited 8 s", whatever_is_raised=True)
last_words.remember("something later")
raise RuntimeError("Horovod has been shut down")"""
    assert stderr_of(code)[-1] == "ef_horovod: rank 0 waited 8 s"


def test_an_error_that_was_caught_is_not_said_again() -> None:
    assert stderr_of(_BEFORE) == []


def stderr_of(code: str) -> list[str]:
    """The lines that a process of its own writes to stderr."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return result.stderr.splitlines()
