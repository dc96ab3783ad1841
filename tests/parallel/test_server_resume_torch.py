"""A torch training with servers that was interrupted goes on to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import server_job

pytestmark = [pytest.mark.parallel, pytest.mark.slow]


@pytest.mark.parametrize(
    ("method", "servers"),
    [
        pytest.param(
            "doublesqueeze", {"whole": 2, "first": 2, "second": 1}, marks=pytest.mark.exhaustive
        ),
        ("ef21", {"whole": 1, "first": 1, "second": 2}),
    ],
    ids=["doublesqueeze", "ef21"],
)
def test_resumed_to_the_same_bits(method: str, servers: dict[str, int], tmp_path: Path) -> None:
    """With another number of servers than before; the last step before was a dropped one."""
    results = {}
    for phase, number in servers.items():
        out = tmp_path / phase
        out.mkdir()
        folder = out if phase == "whole" else tmp_path
        options = (f"--checkpoint={folder / 'server'}",)
        results[phase] = server_job(
            number, 2, "server_torch_resume.py", out, phase, method, str(folder), server=options
        )
    ends = {phase: {result["end"] for result in found} for phase, found in results.items()}
    assert ends["second"] == ends["whole"] != ends["first"]
    assert [len(found) for found in ends.values()] == [1, 1, 1]
    for result in results["whole"]:
        too_late, *not_between_steps = result["errors"]
        assert too_late.startswith(
            "UnsupportedError: got error-feedback state to restore after the first step"
        )
        assert len(not_between_steps) == 2
        for error in not_between_steps:
            assert error.startswith("RuntimeError: checkpoint() was called between backward() and")
