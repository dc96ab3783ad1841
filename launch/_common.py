"""What the launch scripts share: which environment they take, how to make it, how to run in it."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - here, before anything that an older Python cannot read
    sys.exit(
        f"error: this is Python {sys.version.split()[0]} ({sys.executable}), ef_horovod needs 3.10 "
        f"or newer: install one and run `python3.10 {sys.argv[0]}` (or whatever it is called)"
    )

ROOT = Path(__file__).resolve().parent.parent
ABOUT_ENVIRONMENT = """\
It runs in the active virtual environment if that has this package and all that is needed here.
Nothing is installed into that. Otherwise it runs in .venv of the repository, or in the folder that
EF_VENV names. launch/setup makes and fills that one, which takes some minutes the first time."""


def venv_folder() -> Path:
    """The folder of the virtual environment: $EF_VENV, or .venv in the repository."""
    return Path(os.environ.get("EF_VENV") or ROOT / ".venv").absolute()


def venv_python() -> Path:
    return venv_folder() / "bin" / "python"


def load(name: str):
    """A module of ef_horovod or of this folder, before anything is installed.

    It and what it imports may need the standard library only. `ef_horovod/__init__.py` imports
    NumPy, so an empty package stands in for it meanwhile.
    """
    if "ef_horovod" in sys.modules:
        return importlib.import_module(name)
    package = types.ModuleType("ef_horovod")
    package.__path__ = [str(ROOT / "ef_horovod")]
    sys.modules["ef_horovod"] = package
    try:
        return importlib.import_module(name)
    finally:
        for loaded in [key for key in sys.modules if key.partition(".")[0] == "ef_horovod"]:
            del sys.modules[loaded]


def prepare(*arguments: str, needs: tuple[str, ...], own_code: bool = False) -> Path:
    """The Python of the environment to run in; options and arguments are to be checked before.

    It is the active virtual environment if all of `needs` is in it. Otherwise it is $EF_VENV or
    .venv, which `launch/setup` makes and fills; if that fails, this process ends with its status.

    Args:
        arguments: of `launch/setup`.
        needs: modules that the script imports; "horovod.torch" is Horovod built for torch.
        own_code: whether the package must be the one of this repository.
    """
    active = active_folder()
    if active:
        missing = missing_in(active / "bin" / "python", needs, own_code)
        if not missing:
            print(f"running in the active virtual environment {active}", file=sys.stderr)
            return active / "bin" / "python"
        print(
            f"the active virtual environment {active} lacks {', '.join(missing)} and stays as it "
            f"is: running in {venv_folder()} (EF_VENV names another place)",
            file=sys.stderr,
        )
    status = subprocess.call([sys.executable, ROOT / "launch" / "setup", *arguments])
    if status != 0:
        sys.exit(status)
    return venv_python()


def active_folder() -> Path | None:
    """The virtual environment that the user has activated, unless it is one of launch/setup."""
    active = os.environ.get("VIRTUAL_ENV")
    if not active or os.environ.get("EF_VENV") or Path(active).resolve() == venv_folder().resolve():
        return None
    return Path(active).absolute()


_LOOK = """
import importlib.util, json, pathlib, sys
def place(name):
    top, _, part = name.partition(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not part:
        return spec and spec.origin
    folder = pathlib.Path(spec.origin).parent / part
    return next(map(str, folder.glob("mpi_lib*.so")), None)
print(json.dumps({name: place(name) for name in sys.argv[1:]}))
"""


def missing_in(python: Path, needs: tuple[str, ...], own_code: bool = False) -> list[str]:
    """Which of the modules an environment does not have; nothing of them is imported."""
    command = [python, "-c", _LOOK, "ef_horovod", *needs]
    try:
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return [f"a working {python}"]
    places = json.loads(done.stdout)
    missing = [name for name, place in places.items() if place is None]
    if "ef_horovod" in missing:
        return missing
    package = Path(places["ef_horovod"]).resolve()
    allowed = [ROOT] if own_code else [ROOT, python.parent.parent.resolve()]
    if not any(package.is_relative_to(folder) for folder in allowed):
        missing.insert(0, f"the ef_horovod of {ROOT} (it has {package.parent})")
    return missing


def program(python: Path, name: str) -> str:
    """A program such as mpirun: the one beside the environment's Python, else by its name."""
    beside = python.parent / name
    return str(beside) if beside.exists() else name


def child_environment(python: Path | None = None) -> dict[str, str]:
    """Variables for programs that run in the environment, ranks under mpirun among them.

    Args:
        python: of the environment, from `prepare`; that of $EF_VENV or .venv without it.
    """
    venv = (python or venv_python()).parent.parent
    env = dict(os.environ)
    env["VIRTUAL_ENV"] = str(venv)
    env["PATH"] = os.pathsep.join([str(venv / "bin"), env.get("PATH", os.defpath)])
    # One thread a rank: ranks share the cores, and sums then do not depend on the machine.
    for library in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
        env.setdefault(f"{library}_NUM_THREADS", "1")
    env.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Root is the normal user in a container, and small machines have fewer cores than ranks.
    env.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
    env.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    env.setdefault("OMPI_MCA_rmaps_base_oversubscribe", "1")
    if (venv / "bin" / "orted").exists():  # without mpirun, Open MPI's wheel does not find itself
        env.setdefault("OPAL_PREFIX", str(venv))
    if not (shutil.which("ssh") or shutil.which("rsh")):
        env.setdefault("OMPI_MCA_plm", "isolated")  # mpirun wants a login even for this machine
    return env
