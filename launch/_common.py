"""What the launch scripts share: where the environment is, how to make it, how to run in it."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - here, before anything that an older Python cannot read
    sys.exit(
        f"error: this is Python {sys.version.split()[0]} ({sys.executable}), ef_horovod needs 3.10 "
        f"or newer: install one and run `python3.10 {sys.argv[0]}` (or whatever it is called)"
    )

ROOT = Path(__file__).resolve().parent.parent


def venv_folder() -> Path:
    """The folder of the virtual environment: $EF_VENV, or .venv in the repository."""
    return Path(os.environ.get("EF_VENV") or ROOT / ".venv").absolute()


def venv_python() -> Path:
    return venv_folder() / "bin" / "python"


def load_progress():
    """The package's progress module, loaded by path: it is needed before the package is there."""
    spec = importlib.util.spec_from_file_location(
        "ef_progress", ROOT / "ef_horovod" / "_progress.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(*arguments: str) -> Path:
    """Run `launch/setup`, leave with its status if it fails; returns the environment's Python."""
    status = subprocess.call([sys.executable, ROOT / "launch" / "setup", *arguments])
    if status != 0:
        sys.exit(status)
    return venv_python()


def child_environment() -> dict[str, str]:
    """Variables for programs that run in the environment, ranks under mpirun among them."""
    venv = venv_folder()
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
