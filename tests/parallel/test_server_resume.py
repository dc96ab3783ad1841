"""A job with servers that was interrupted goes on to the same bits."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from launching import ended_job, server_job

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

PROGRAM = "server_resume.py"


def test_resumed_to_the_same_bits(tmp_path: Path) -> None:
    """Two servers before, one server after; the last step before was a dropped one."""
    ends = {}
    for phase, servers in (("whole", 2), ("first", 2), ("second", 1)):
        out = tmp_path / phase
        out.mkdir()
        folder = out if phase == "whole" else tmp_path
        options = (f"--checkpoint={folder / 'server-{}'}",)
        arguments = (phase, "all", str(folder))
        ends[phase] = server_job(servers, 2, PROGRAM, out, *arguments, server=options, jobs=4)
    methods = ends["whole"][0].keys()
    assert len(methods) == 4
    for method in methods:
        end = {phase: [result[method] for result in results] for phase, results in ends.items()}
        assert end["second"] == end["whole"]
        assert end["first"] != end["whole"]
        assert end["whole"][0] == end["whole"][1]


def test_a_killed_worker_leaves_a_checkpoint(tmp_path: Path) -> None:
    """The server writes its last complete step when mpirun ends the job, and it can be used."""
    begin = time.monotonic()
    options = (f"--checkpoint={tmp_path / 'server'}",)
    arguments = ("killed", "doublesqueeze", str(tmp_path))
    patience = {"OMPI_MCA_odls_base_sigkill_timeout": "6"}  # as launch/server sets it, but shorter
    output, _ = ended_job(1, 2, PROGRAM, tmp_path, *arguments, server=options, environment=patience)
    assert time.monotonic() - begin < 60
    assert "told to end (SIGTERM): a rank has died" in output
    (file,) = (tmp_path / "server").glob("*/server-0.npz")
    assert file.parent.name == "step-000000006"
    with np.load(file) as content:
        assert {"bucket.0/error", "bucket.1/error", "dense.0/"} <= set(content.files)
        assert np.any(content["bucket.0/error"])
    assert not list((tmp_path / "server").glob("**/*.part"))
    (tmp_path / "rank0.json").unlink(missing_ok=True)
    again = tmp_path / "again"
    again.mkdir()
    arguments = ("second", "doublesqueeze", str(tmp_path))
    results = server_job(1, 2, PROGRAM, again, *arguments, server=options)
    assert results[0] == results[1]


def test_a_server_without_that_step_refuses(tmp_path: Path) -> None:
    first = ("first", "ef21", str(tmp_path))
    server_job(1, 2, PROGRAM, tmp_path, *first, server=(f"--checkpoint={tmp_path / 'server'}",))
    second = ("second", "ef21", str(tmp_path))
    empty = (f"--checkpoint={tmp_path / 'empty'}",)
    for options, held in (((), "no --checkpoint"), (empty, "checkpoints of steps []")):
        output, _ = ended_job(1, 2, PROGRAM, tmp_path, *second, server=options)
        problem = f"the workers continue with step 6 and the server has {held}, expected one of"
        assert f"ConfigMismatchError: {problem}" in output


def test_a_checkpoint_needs_a_folder(tmp_path: Path) -> None:
    output, _ = ended_job(1, 2, PROGRAM, tmp_path, "first", "ef21", str(tmp_path))
    assert "asked for a checkpoint, expected a server with a folder for it" in output
