"""A TensorFlow training with servers that was interrupted goes on to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import server_job

pytestmark = [pytest.mark.parallel, pytest.mark.slow]


@pytest.mark.parametrize(("way", "before", "after"), [("eager", 1, 2), ("fit", 2, 1)])
def test_resumed_to_the_same_bits(way: str, before: int, after: int, tmp_path: Path) -> None:
    """With another number of servers than before; eagerly, after a dropped step."""
    results = {}
    for phase, servers in (("whole", before), ("first", before), ("second", after)):
        out = tmp_path / phase
        out.mkdir()
        folder = out if phase == "whole" else tmp_path
        options = (f"--checkpoint={folder / 'server'}",)
        arguments = (way, phase, str(folder))
        results[phase] = server_job(
            servers, 2, "server_tensorflow_resume.py", out, *arguments, server=options
        )
    ends = {phase: {result["end"] for result in found} for phase, found in results.items()}
    assert ends["second"] == ends["whole"] != ends["first"]
    assert [len(found) for found in ends.values()] == [1, 1, 1]
    for result in results["whole"]:
        too_early, too_late = result["errors"]
        assert too_early.startswith("UnsupportedError: got checkpoint() before the first step")
        assert "got error-feedback state to restore after the first step or checkpoint" in too_late
