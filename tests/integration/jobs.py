"""Starts the example scripts as users do, with a limit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BIN = Path(sys.executable).parent  # not resolved: a venv's python is a link
_TAG = re.compile(r"\[\d+,\d+\]<std(out|err)>:")

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # two cores, several ranks
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "EF_HOROVOD_TIMEOUT": "120",
    "TQDM_MININTERVAL": "10",
    "PATH": f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}",
}


def run_example(name: str, *arguments: object, ranks: int = 0, timeout: float = 180) -> str:
    """Run examples/NAME, under horovodrun if `ranks` are given; what it printed, without tags.

    It runs in the repository's root, but never writes there unless the arguments say so.
    """
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    if ranks:
        command = [str(_BIN / "horovodrun"), "-np", str(ranks), *command]
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **_ENVIRONMENT},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that all of the job can be ended
    )
    try:
        output, _ = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        output, _ = job.communicate()
        raise AssertionError(f"{name} did not end within {timeout} s:\n{output[-4000:]}") from None
    assert job.returncode == 0, f"{name} ended with {job.returncode}:\n{output[-8000:]}"
    return _TAG.sub("", output)
