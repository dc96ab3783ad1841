"""Builds stock Horovod for current frameworks: the recipe, a cache of wheels, and a check.

Unmodified, Horovod 0.28.1 does not compile against current torch and TensorFlow. It needs no patch;
files that `write_recipe` puts in a folder, and the environment of the build, solve each problem:

1. Horovod asks for C++14, but torch's headers need C++20. A CMake toolchain file appends the
   standard to every compile. It also adds two standard headers that Horovod and its Gloo use
   without including them; up to g++ 12 other headers include them.
2. TensorFlow's headers include two third-party headers by a short name. Their folders go on
   CPLUS_INCLUDE_PATH.
3. `xla_builder.h` has moved. A forwarding header with the old name goes on CPLUS_INCLUDE_PATH.
4. The build needs the installed frameworks and an older setuptools. It runs in a temporary
   environment with its own build tools, which sees the user's packages through a .pth file. The
   user's setuptools stays unchanged.

The wheel finds libmpi and the frameworks relative to its own folder ($ORIGIN). So one wheel works
in every environment with the same versions, at any path.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path

from ef_horovod.common.progress import run_logged
from ef_horovod.horovod_build.check import check_horovod
from ef_horovod.horovod_build.toolkit import (
    BUILD_VARIABLE,
    FRAMEWORKS,
    HOROVOD_NAME,
    BuildError,
    Toolkit,
    find_toolkit,
    key_of,
)
from ef_horovod.horovod_build.wheel_cache import (
    cached_wheel,
    default_cache,
    folder_name,
    locked,
    publish,
    require_cache,
)

__all__ = ["FRAMEWORKS", "HOROVOD", "BuildError", "Options", "build_horovod"]

HOROVOD = "0.28.1"
BUILD_TOOLS = ("setuptools<81", "wheel", "packaging", "cloudpickle", "psutil", "pyyaml", "cffi")
CMAKE_OLDEST = (3, 21)  # the first version that reads CMAKE_TOOLCHAIN_FILE from the environment
CMAKE_PIN = "cmake<4"  # for a machine without CMake, or with an older version
BUILD_FLAGS = (
    *("--verbose", "--no-deps", "--no-build-isolation", "--no-cache-dir"),
    *("--no-binary", "horovod"),
)
BUILD_DISK_BYTES = 1 * 1000**3  # for the object files and the two libraries with debug symbols

TOOLCHAIN = """\
set(EF_FLAGS "-std=gnu++20 -include string -include cstdint")
set(CMAKE_CXX_COMPILE_OBJECT
    "<CMAKE_CXX_COMPILER> <DEFINES> <INCLUDES> <FLAGS> ${EF_FLAGS} -o <OBJECT> -c <SOURCE>")
# A library that no symbol needs would be recorded by its path in this environment.
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-Wl,--as-needed")
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
"""
# Makes torch's own helper report a CPU build, so that nothing asks for the CUDA toolkit.
HIDE_CUDA = """\
import sys
from importlib.machinery import PathFinder


class WithoutCuda:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torch.version":
            return None
        spec = PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), setattr(module, "cuda", None))
        return spec


sys.meta_path.insert(0, WithoutCuda)
"""
NO_CUDA_TOOLKIT = (
    "note: torch has CUDA, no complete CUDA toolkit was found, so this Horovod takes CPU tensors "
    "only: for GPUs install the toolkit, set CUDA_HOME and HOROVOD_GPU_OPERATIONS=NCCL"
)
XLA_OLD = "tensorflow/compiler/xla/client/xla_builder.h"
XLA_NEW = "tensorflow/compiler/xla/hlo/builder/xla_builder.h"
# TensorFlow's headers include files of these two folders without the folder's name.
TENSORFLOW_EXTRA_INCLUDES = ("external/highwayhash", "external/farmhash_archive/src")


@dataclass(frozen=True)
class Options:
    """Options of `build_horovod`."""

    frameworks: tuple[str, ...] = ()  # empty: all that are installed
    cache: Path | None = None
    rebuild: bool = False
    jobs: int | None = None


def build_horovod(options: Options, environment: Mapping[str, str] = os.environ) -> Path:
    """Build (or take from the cache), install and check Horovod; returns the wheel.

    Raises:
        BuildError: a requirement of the build is missing, or the result does not work.
        CommandFailed: pip or the compiler failed; the message names the log.
    """
    require_pip()
    cache = options.cache or default_cache(environment)
    require_cache(cache)
    toolkit = find_toolkit(options.frameworks, environment)
    print(f"Horovod {HOROVOD} for {describe(toolkit)}", flush=True)
    if toolkit.hides_cuda:
        print(NO_CUDA_TOOLKIT, flush=True)
    key = key_of(toolkit, HOROVOD, recipe_hash(toolkit, environment), environment)
    folder = cache / folder_name(key)
    with locked(folder.with_name(folder.name + ".lock")):
        wheel = cached_wheel(folder)
        if wheel is None or options.rebuild:
            wheel = build_into(folder, toolkit, key, options.jobs, environment)
        else:
            print(f"taking the wheel from the cache: {wheel}", flush=True)
    install(wheel, folder.with_name(folder.name + ".log"))
    check_horovod(toolkit, environment)
    return wheel


def describe(toolkit: Toolkit) -> str:
    parts = [f"{name} {version}" for name, version in toolkit.frameworks.items()]
    mpi = toolkit.mpi
    parts += [f"{mpi.name} {mpi.version}" if mpi else "Gloo only", toolkit.compiler]
    return ", ".join(parts)


def require_pip() -> None:
    if util.find_spec("pip") is None:
        raise BuildError(
            f"pip is not installed in the environment of {sys.executable}, Horovod is built and "
            "installed with it: add it with `python -m ensurepip`"
        )


# --- the recipe --------------------------------------------------------------------------------


def recipe_hash(toolkit: Toolkit, environment: Mapping[str, str]) -> str:
    """A hash of the recipe, so that no wheel of an older recipe is used.

    It covers all inputs of the build: files, pins, flags, variables. Only paths that may differ
    between environments with the same wheel are left out.
    """
    if toolkit.mpi and toolkit.mpi.library_dir:  # its compiler moves with the libraries
        toolkit = replace(toolkit, mpi=replace(toolkit.mpi, compiler=Path("mpicxx")))
    chosen = {name: value for name, value in environment.items() if BUILD_VARIABLE.match(name)}
    variables = build_environment(Path("recipe"), toolkit, Path("python"), None, chosen)
    for place in ("PATH", "MAKEFLAGS", "CPLUS_INCLUDE_PATH", "CMAKE_TOOLCHAIN_FILE"):
        variables.pop(place)
    own = Path(environment.get("CMAKE_TOOLCHAIN_FILE") or os.devnull)
    parts = [
        recipe_files(toolkit, environment),
        TENSORFLOW_EXTRA_INCLUDES,
        build_tools(environment),
        BUILD_FLAGS,
        HIDE_CUDA if toolkit.hides_cuda else "",
        variables,
        own.read_text(errors="replace") if own.exists() else "",
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def build_into(
    folder: Path, toolkit: Toolkit, key: Mapping[str, str], jobs: int | None, env: Mapping[str, str]
) -> Path:
    """Build the wheel in a temporary folder and put it in the cache."""
    log = folder.with_name(folder.name + ".log")
    log.unlink(missing_ok=True)  # one log per build
    with tempfile.TemporaryDirectory(prefix="ef-horovod-") as name:
        work = Path(name)
        require_disk(work)
        python = make_build_python(work / "python", toolkit, log, build_tools(env))
        write_recipe(work / "recipe", toolkit, env)
        build_env = build_environment(work / "recipe", toolkit, python, jobs, env)
        wheel = [python, "-m", "pip", "wheel", *BUILD_FLAGS, f"horovod=={HOROVOD}"]
        run_logged(
            [*wheel, "--wheel-dir", work / "wheel"],
            label="building Horovod (4 to 10 minutes on 2 cores)",
            log=log,
            env=build_env,
            percent_of=make_percentage,
        )
        return publish(next((work / "wheel").glob("horovod-*.whl")), folder, key)


def require_disk(work: Path) -> None:
    free = shutil.disk_usage(work).free
    if free < BUILD_DISK_BYTES:
        raise BuildError(
            f"{work.parent} has {free / 1e9:.1f} GB free, building Horovod needs "
            f"{BUILD_DISK_BYTES / 1e9:.0f} GB: free some, or set TMPDIR to a larger place"
        )


def make_percentage(line: str) -> int | None:
    """The number in make's `[ 42%] Building ...`."""
    match = re.match(r"\s*\[\s*(\d+)%\]", line)
    return int(match.group(1)) if match else None


def needs_cmake(environment: Mapping[str, str]) -> bool:
    """Whether Horovod's CMake is missing or too old for a toolchain variable."""
    name = environment.get("HOROVOD_CMAKE", "cmake")
    path = shutil.which(name, path=environment.get("PATH"))
    if path is None:
        return True
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"version (\d+)\.(\d+)", text)
    return match is None or (int(match.group(1)), int(match.group(2))) < CMAKE_OLDEST


def build_tools(environment: Mapping[str, str]) -> list[str]:
    """The packages that pip installs into the build environment."""
    return [*BUILD_TOOLS, *([CMAKE_PIN] if needs_cmake(environment) else [])]


def make_build_python(folder: Path, toolkit: Toolkit, log: Path, tools: list[str]) -> Path:
    """A temporary environment: its own build tools first, then the user's packages."""
    run_logged(
        [sys.executable, "-m", "venv", "--without-pip", folder], label="build environment", log=log
    )
    python = folder / "bin" / "python"
    own = next(folder.glob("lib/python*/site-packages"))
    seen = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (own / "packages_of_the_user.pth").write_text("\n".join(seen) + "\n")
    if toolkit.hides_cuda:
        (own / "sitecustomize.py").write_text(HIDE_CUDA)
    run_logged(
        [python, "-m", "pip", "install", "--quiet", "--ignore-installed", *tools],
        label="build tools",
        log=log,
    )
    return python


def write_recipe(folder: Path, toolkit: Toolkit, environment: Mapping[str, str]) -> None:
    """Write the toolchain file and the forwarding header."""
    for name, text in recipe_files(toolkit, environment).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def recipe_files(toolkit: Toolkit, environment: Mapping[str, str]) -> dict[str, str]:
    """The recipe's files: {name in the recipe's folder: content}."""
    lines = [TOOLCHAIN, f'set(CMAKE_INSTALL_RPATH "{";".join(rpath(toolkit))}")\n']
    if keeps_link_paths(toolkit, environment):
        lines.append("set(CMAKE_INSTALL_RPATH_USE_LINK_PATH ON)\n")
    if toolkit.mpi:
        lines.append(f'set(MPI_CXX_COMPILER "{toolkit.mpi.compiler}" CACHE FILEPATH "")\n')
    if environment.get("CMAKE_TOOLCHAIN_FILE"):
        lines.append(f'include("{environment["CMAKE_TOOLCHAIN_FILE"]}")\n')
    header = f'#include "{XLA_NEW}"\n'
    return {"toolchain.cmake": "".join(lines), f"include/{XLA_OLD}": header}


def rpath(toolkit: Toolkit) -> list[str]:
    """The extension's library paths, relative to its own folder horovod/torch."""
    places = ["$ORIGIN/../../torch/lib", "$ORIGIN/../../tensorflow"]
    if toolkit.mpi and toolkit.mpi.library_dir:
        extension = Path(os.path.realpath(sysconfig.get_path("platlib"))) / "horovod" / "torch"
        libraries = os.path.realpath(toolkit.mpi.library_dir)
        places.insert(0, f"$ORIGIN/{os.path.relpath(libraries, extension)}")
    return places


def keeps_link_paths(toolkit: Toolkit, environment: Mapping[str, str]) -> bool:
    """Whether libraries outside the environment are linked (a system's MPI, NCCL, CUDA).

    Only then are absolute paths recorded. Paths into an environment would not exist for another
    user of the cache.
    """
    outside_mpi = toolkit.mpi is not None and toolkit.mpi.library_dir is None
    return outside_mpi or any(
        name.startswith(("HOROVOD_GPU", "HOROVOD_NCCL")) for name in environment
    )


def build_environment(
    recipe: Path, toolkit: Toolkit, python: Path, jobs: int | None, environment: Mapping[str, str]
) -> dict[str, str]:
    """Variables of the build; the user's settings are kept."""
    env = dict(environment)
    first = [str(python.parent), *([str(toolkit.mpi.compiler.parent)] if toolkit.mpi else [])]
    env["PATH"] = os.pathsep.join([*first, env.get("PATH", os.defpath)])
    env["CMAKE_TOOLCHAIN_FILE"] = str(recipe / "toolchain.cmake")
    include = [str(recipe / "include"), *tensorflow_includes(toolkit)]
    include += [env["CPLUS_INCLUDE_PATH"]] if env.get("CPLUS_INCLUDE_PATH") else []
    env["CPLUS_INCLUDE_PATH"] = os.pathsep.join(include)
    env.setdefault("CMAKE_POLICY_VERSION_MINIMUM", "3.5")  # CMake 4 refuses the bundled Gloo's 2.8
    if jobs or "MAKEFLAGS" not in env:
        env["MAKEFLAGS"] = f"-j{jobs or os.cpu_count() or 1}"
    for name in ("CUDA_HOME", "CUDAToolkit_ROOT", "HOROVOD_CUDA_HOME"):  # torch's, CMake's, its own
        if toolkit.cuda:
            env.setdefault(name, toolkit.cuda)
    for name, wanted in horovod_parts(toolkit).items():
        if f"HOROVOD_WITH_{name}" not in env and f"HOROVOD_WITHOUT_{name}" not in env:
            env[f"HOROVOD_{'WITH' if wanted else 'WITHOUT'}_{name}"] = "1"
    env.setdefault("HOROVOD_CPU_OPERATIONS", "MPI" if toolkit.mpi else "GLOO")
    return env


def horovod_parts(toolkit: Toolkit) -> dict[str, bool]:
    """Which parts of Horovod to request, so that a missing part is an error."""
    parts = {HOROVOD_NAME[name]: name in toolkit.frameworks for name in FRAMEWORKS}
    return parts | {"MXNET": False, "MPI": toolkit.mpi is not None, "GLOO": True}


def tensorflow_includes(toolkit: Toolkit) -> list[str]:
    if "tensorflow" not in toolkit.frameworks:
        return []
    spec = util.find_spec("tensorflow")
    if spec is None or not spec.submodule_search_locations:
        return []
    include = Path(spec.submodule_search_locations[0]) / "include"
    return [str(include / extra) for extra in TENSORFLOW_EXTRA_INCLUDES]


# --- installing --------------------------------------------------------------------------------


def install(wheel: Path, log: Path) -> None:
    """Install the wheel with its run-time dependencies, unless the same wheel is installed."""
    installed = installed_hash()
    if installed == hashlib.sha256(wheel.read_bytes()).hexdigest():
        return
    pip = [sys.executable, "-m", "pip"]
    if installed is not None:
        run_logged([*pip, "uninstall", "--yes", "horovod"], label="removing Horovod", log=log)
    run_logged([*pip, "install", "--quiet", wheel], label="installing Horovod", log=log)


def installed_hash() -> str | None:
    """SHA-256 of the installed Horovod's wheel: "" if unknown, None without Horovod."""
    try:
        text = metadata.distribution("horovod").read_text("direct_url.json") or "{}"
    except metadata.PackageNotFoundError:
        return None
    return str(json.loads(text).get("archive_info", {}).get("hash", "")).partition("=")[2]
