"""A TensorFlow training with servers that was interrupted goes on to the same bits."""

from __future__ import annotations

from typing import Any

import pytest
from launching import server_job

pytestmark = [pytest.mark.parallel, pytest.mark.slow]


WAYS = ("eager", "fit")
PROGRAM = "server_tensorflow_resume.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By phase and way, of both workers; two servers before, and one in new processes."""
    folder = tmp_path_factory.mktemp("resume")
    options = (f"--checkpoint={folder / 'server{}'}",)  # the second start finds those of the first
    before = [f"first {way}" for way in WAYS] + [f"whole {way}" for way in WAYS]
    after = [f"second {way}" for way in WAYS]
    found: dict[str, list[Any]] = {}
    for servers, jobs in ((2, before), (1, after)):
        words = (str(folder), *jobs)
        of_ranks = server_job(
            servers, 2, PROGRAM, folder, *words, server=options, jobs=len(jobs), timeout=300
        )
        found |= {job: [of_rank[job] for of_rank in of_ranks] for job in jobs}
    return found


@pytest.mark.parametrize("way", WAYS)
def test_resumed_to_the_same_bits(way: str, results: Any) -> None:
    """With another number of servers than before; eagerly, after a dropped step."""
    phases = ("whole", "first", "second")
    whole, first, second = ({one["end"] for one in results[f"{phase} {way}"]} for phase in phases)
    assert second == whole != first
    assert [len(found) for found in (whole, first, second)] == [1, 1, 1]
    for result in results[f"whole {way}"]:
        too_early, too_late = result["errors"]
        assert too_early.startswith("UnsupportedError: got checkpoint() before the first step")
        assert "got error-feedback state to restore after the first step or checkpoint" in too_late
