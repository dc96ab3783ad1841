"""Checks this environment's Horovod: import, `--check-build`, an allreduce of two ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from ef_horovod.common.openmpi import set_prefix
from ef_horovod.common.progress import Ticker
from ef_horovod.horovod_build.toolkit import BuildError, Toolkit

TIMEOUT_SECONDS = 180
SHOWN_NAME = {"torch": "PyTorch", "tensorflow": "TensorFlow"}  # in `horovodrun --check-build`
SUM = {
    "torch": "import torch; x = torch.ones(3)",
    "tensorflow": "import tensorflow; x = tensorflow.ones(3)",
}
ALLREDUCE = """
import horovod.{framework} as hvd
{make_x}
hvd.init()
total = hvd.allreduce(x * (hvd.rank() + 1), op=hvd.Sum, name="check").numpy().tolist()
assert hvd.size() == 2, f"got {{hvd.size()}} ranks, expected 2"
assert total == [3.0, 3.0, 3.0], f"got {{total}}, expected a sum of 3.0"
"""


def check_horovod(toolkit: Toolkit, environment: Mapping[str, str]) -> None:
    """Raise unless every built part works.

    Raises:
        BuildError: an import fails, a part is missing, or the allreduce gives a wrong result.
    """
    env = run_environment(toolkit, environment)
    for framework in toolkit.frameworks:
        with Ticker(f"checking: import horovod.{framework}"):
            _run([sys.executable, "-c", f"import horovod.{framework}"], env)
    horovodrun = Path(sysconfig.get_path("scripts")) / "horovodrun"
    with Ticker("checking: horovodrun --check-build"):
        require_parts(_run([horovodrun, "--check-build"], env), toolkit)
    for framework in toolkit.frameworks:
        code = ALLREDUCE.format(framework=framework, make_x=SUM[framework])
        launcher = [horovodrun, "-np", "2", *([] if toolkit.mpi else ["--gloo"])]
        with Ticker(f"checking: allreduce of 2 ranks with horovod.{framework}"):
            _run([*launcher, sys.executable, "-c", code], env)


def run_environment(toolkit: Toolkit, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for two small ranks on any machine, also for root in a one-core container."""
    env = dict(environment)
    first = [sysconfig.get_path("scripts")]
    first += [str(toolkit.mpi.compiler.parent)] if toolkit.mpi else []
    env["PATH"] = os.pathsep.join([*first, env.get("PATH", os.defpath)])
    env |= {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    env |= {"OMPI_MCA_rmaps_base_oversubscribe": "1"}
    set_prefix(env)
    if not any(shutil.which(name, path=env["PATH"]) for name in ("ssh", "rsh")):
        env.setdefault("OMPI_MCA_plm", "isolated")  # else mpirun needs ssh even for this machine
    return env


def require_parts(report: str, toolkit: Toolkit) -> None:
    """Raise unless the report has an [X] for every requested framework and controller."""
    wanted = [SHOWN_NAME[name] for name in toolkit.frameworks]
    wanted += ["MPI"] if toolkit.mpi else ["Gloo"]
    missing = [name for name in wanted if f"[X] {name}" not in report]
    if missing:
        raise BuildError(
            f"horovodrun --check-build shows no {' and no '.join(missing)}, expected "
            f"{', '.join(wanted)}: build again with `ef-horovod build-horovod --rebuild`"
        )


def _run(command: Sequence[object], env: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(
            [str(word) for word in command],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BuildError(
            f"`{_shown(command)}` did not end within {TIMEOUT_SECONDS} s, expected it to: see "
            "whether mpirun starts at all with `mpirun -np 2 hostname`"
        ) from None
    if done.returncode != 0:
        output = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise BuildError(
            f"`{_shown(command)}` ended with status {done.returncode}, expected 0: build again "
            f"with `ef-horovod build-horovod --rebuild` if a version has changed\n{output}"
        )
    return done.stdout


def _shown(command: Sequence[object]) -> str:
    """The command, without the program text after -c."""
    words = [str(word) for word in command]
    return " ".join("..." if "\n" in word else word for word in words)
