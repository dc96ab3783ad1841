"""A torch training with servers that was interrupted goes on to the same bits."""

from __future__ import annotations

from typing import Any

import pytest
from launching import server_job

pytestmark = [pytest.mark.parallel, pytest.mark.slow]


METHODS = ("doublesqueeze", "ef21")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By phase and method, of both workers; one server before, and two in new processes."""
    folder = tmp_path_factory.mktemp("resume")
    options = (f"--checkpoint={folder / 'server{}'}",)  # the second start finds those of the first
    before = [f"first {name}" for name in METHODS] + [f"whole {name}" for name in METHODS]
    after = [f"second {name}" for name in METHODS]
    found: dict[str, list[Any]] = {}
    for servers, jobs in ((1, before), (2, after)):
        words = (str(folder), *jobs)
        of_ranks = server_job(
            servers, 2, "server_torch_resume.py", folder, *words, server=options, jobs=len(jobs)
        )
        found |= {job: [of_rank[job] for of_rank in of_ranks] for job in jobs}
    return found


@pytest.mark.parametrize("method", METHODS)
def test_resumed_to_the_same_bits(method: str, results: Any) -> None:
    """With another number of servers than before; the last step before was a dropped one."""
    phases = ("whole", "first", "second")
    whole, first, second = (
        {one["end"] for one in results[f"{phase} {method}"]} for phase in phases
    )
    assert second == whole != first
    assert [len(found) for found in (whole, first, second)] == [1, 1, 1]
    for result in results[f"whole {method}"]:
        too_late, *not_between_steps = result["errors"]
        assert too_late.startswith(
            "UnsupportedError: got error-feedback state to restore after the first step"
        )
        assert len(not_between_steps) == 2
        for error in not_between_steps:
            assert error.startswith("RuntimeError: checkpoint() was called between backward() and")
