"""What of docker/ needs no engine: the Dockerfile's copies, the build's context, what is said."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import machinery, util
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text().replace("\\\n", " ")


def load(name: str, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for folder in ("launch", "docker"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    loader = machinery.SourceFileLoader(f"docker_{name}", str(ROOT / "docker" / name))
    module = util.module_from_spec(util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def build(monkeypatch, tmp_path):
    """The script docker/build on a machine where nothing is set and no wheel is cached."""
    for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return load("build", monkeypatch)


def copied(stage: str) -> set[str]:
    """What one stage copies from the repository."""
    text = re.search(rf"^FROM \S+ AS {stage}$(.*?)(^FROM |\Z)", DOCKERFILE, re.M | re.S).group(1)
    lines = re.findall(r"^COPY ((?!--from).*)$", text, re.M)
    return {word for line in lines for word in line.split()[:-1]}


def imported_by(module: str, found: set[str] | None = None) -> set[str]:
    """Files of the package that a module needs to be imported, itself included."""
    found = set() if found is None else found
    file = f"{module.replace('.', '/')}.py"
    if file in found:
        return found
    found.add(file)
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ef_horovod"):
            imported_by(node.module, found)
    return found


def test_horovods_layer_depends_on_what_builds_it_and_nothing_else():
    package = imported_by("ef_horovod.horovod_build.build")
    setup = {"launch/setup", "launch/_common.py", "launch/constraints.txt"}
    assert copied("recipe") == package | setup | {"setup.cfg", "pyproject.toml"}
    command = imported_by("ef_horovod.cli.main") - package
    assert command <= copied("build"), "launch/setup calls the command"
    assert all(name.startswith("docker/site/") for name in copied("build") - command)


def test_the_command_starts_with_the_files_of_its_layer(tmp_path):
    for name in sorted(copied("recipe") | copied("build")):
        if name.startswith("ef_horovod/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "ef_horovod" / "__init__.py").touch()
    words = [sys.executable, "-m", "ef_horovod.cli.main", "build-horovod", "--help"]
    done = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_what_pip_reads_of_pyproject_comes_first():
    """The Dockerfile cuts the file at its first empty line."""
    first = (ROOT / "pyproject.toml").read_text().split("\n\n")[0]
    assert first.startswith("[build-system]\n")
    assert "build-backend" in first


@pytest.mark.parametrize("stage", ["recipe", "build", "runtime"])
def test_the_context_has_all_that_is_copied(stage, build, tmp_path):
    context = tmp_path / "context"
    context.mkdir()
    build.lay_out(context, build.make_parser().parse_args([]))
    assert [name for name in sorted(copied(stage)) if not (context / name).exists()] == []
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = [line[1:] for line in ignored if line.startswith("!")]
    for name in copied(stage):
        assert any(f"{name}/".startswith(f"{place}/") for place in let_in), name


def test_what_a_site_adds_lies_where_the_dockerfile_looks(build, tmp_path):
    for name in ("torch-2.13.0+cpu-cp311-x.whl", "torch-2.12.0-cp311-x.whl", "other-1-x.whl"):
        (tmp_path / name).touch()
    (tmp_path / "bundle.pem").write_text("CA")
    (tmp_path / "pip.ini").write_text("[global]")
    wheel = tmp_path / "cache" / "ef_horovod" / "horovod-0.28.1_key" / "horovod.whl"
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    (wheel.parent / "key.json").touch()
    (wheel.parent.with_name("horovod-unfinished")).mkdir()
    words = ["--ca", "bundle.pem", "--pip-config", "pip.ini", "--wheels", "."]
    words = [word if word.startswith("--") else str(tmp_path / word) for word in words]
    context = tmp_path / "context"
    context.mkdir()
    build.lay_out(context, build.make_parser().parse_args(words))
    site = context / "docker" / "site"
    files = {str(f.relative_to(site)) for f in site.rglob("*") if f.is_file()}
    assert {name for name in files if not name.endswith(".gitignore")} == {
        "pip/site.crt",
        "pip/pip.conf",
        "pip/wheels/torch-2.13.0+cpu-cp311-x.whl",
        "horovod/horovod-0.28.1_key/horovod.whl",
        "horovod/horovod-0.28.1_key/key.json",
    }
    assert (site / "pip" / "pip.conf").read_text() == "[global]"
    other = tmp_path / "other"
    other.mkdir()
    build.lay_out(other, build.make_parser().parse_args(["--fresh"]))
    found = [f for f in (other / "docker" / "site").rglob("*") if f.is_file()]
    assert {file.name for file in found} == {".gitignore"}


def test_defaults_come_from_the_variables_that_pip_reads(build, monkeypatch, tmp_path):
    (tmp_path / "bundle.pem").touch()
    monkeypatch.setenv("PIP_CERT", str(tmp_path / "gone.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "bundle.pem"))
    monkeypatch.setenv("PIP_FIND_LINKS", "https://example.org/wheels")
    arguments = build.make_parser().parse_args([])
    assert arguments.ca == tmp_path / "bundle.pem"
    assert arguments.wheels is None
    assert build.proxies({"HTTPS_PROXY": "x", "no_proxy": "y", "http_proxy": ""}) == [
        "HTTPS_PROXY",
        "no_proxy",
    ]


def test_a_file_that_is_not_there_is_named(build, tmp_path):
    arguments = build.make_parser().parse_args(["--ca", str(tmp_path / "no.pem")])
    context = tmp_path / "context"
    context.mkdir()
    with pytest.raises(build.EngineError, match=r"no\.pem, expected a file that can be read"):
        build.lay_out(context, arguments)


def test_the_compose_file_has_nodes_that_differ_by_name_alone():
    compose = yaml.safe_load((ROOT / "docker" / "compose.yml").read_text())
    nodes = compose["services"]
    assert list(nodes) == ["node1", "node2", "node3", "node4"]
    for name, node in nodes.items():
        assert node.pop("hostname") == name
        assert node == compose["x-node"]
    assert compose["networks"]["nodes"]["internal"] is True
    assert "keys:/run/ef-ssh" in compose["x-node"]["volumes"]
    assert list(compose["volumes"]) == ["keys"]


# --- without an engine ---------------------------------------------------------------------------


@pytest.fixture
def only_python(monkeypatch, tmp_path):
    """A PATH with Python and env, to which a test may add a docker."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def said_by(*command: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / command[0]), *command[1:]],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "command", [("docker/build",), ("docker/test",), ("docker/test", "--check")]
)
def test_no_docker(command, only_python):
    status, said = said_by(*command)
    assert status == 1
    assert "docker was not found on PATH, expected Docker: `apt-get install docker.io" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        (
            "echo 'Cannot connect to the Docker daemon' >&2\nexit 1",
            "no Docker engine answers (Cannot connect to the Docker daemon), expected one",
        ),
        ('[ "$1" = version ]', "neither `docker compose` nor docker-compose was found"),
    ],
    ids=["no engine", "no compose"],
)
def test_what_the_client_lacks(client, expected, only_python):
    script = only_python / "docker"
    script.write_text(f"#!/bin/sh\n{client}\n")
    script.chmod(0o755)
    status, said = said_by("docker/test", "--check")
    assert status == 1
    assert expected in said


def test_launch_test_looks_for_docker_before_it_begins(only_python, monkeypatch, tmp_path):
    monkeypatch.setenv("EF_VENV", str(tmp_path / "venv"))
    (only_python / "env").symlink_to("/usr/bin/env")
    status, said = said_by("launch/test", "--docker")
    assert status == 1
    assert "docker was not found on PATH" in said
    assert not (tmp_path / "venv").exists()


def test_without_nodes_their_tests_are_not_collected(monkeypatch):
    monkeypatch.delenv("EF_DOCKER_PROJECT", raising=False)
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/docker"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 5, done.stdout
    assert "no tests collected" in done.stdout


def test_a_step_that_takes_too_long_is_ended(build, tmp_path):
    script = f"sleep 60 & echo $! > {tmp_path}/pid; wait"
    with pytest.raises(build.EngineError, match=r"did not end within 1 s"):
        build.run(["sh", "-c", script], 1)
    pid = int((tmp_path / "pid").read_text())
    limit = time.monotonic() + 10
    while "sleep" in command_of(pid):
        assert time.monotonic() < limit, "with it ends what it has started"
        time.sleep(0.05)


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return ""


def test_the_table_tells_what_failed(monkeypatch, tmp_path):
    test = load("test", monkeypatch)
    table = test.Table()
    assert table.step("build", lambda: 0) is True
    assert table.step("start", lambda: 3) is False

    def too_long() -> int:
        raise test.engine.EngineError("it did not end within 1 s")

    assert table.step("tests", too_long) is False
    junit = tmp_path / "junit.xml"
    junit.write_text(
        '<testsuites><testsuite><testcase name="test_one_node[--mpi]" time="1.5"/>'
        '<testcase name="test_two" time="2"><failure/></testcase></testsuite></testsuites>'
    )
    table.add_tests(junit)
    assert [row[1] for row in table.rows] == [
        "passed",
        "FAILED (status 3)",
        "FAILED",
        "passed",
        "FAILED",
    ]
    assert len(str(table).splitlines()) == 1 + 5
    assert "  one node[--mpi]" in str(table)
