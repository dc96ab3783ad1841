"""A cluster's folder of a few small files; the kernel removes everything else."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from virtual_cluster import ClusterError, login
from virtual_cluster.network import Host

_PREFIX = "ef-cluster-"
_LOCK = "lock"


@contextmanager
def run_folder(hosts: Sequence[Host]) -> Iterator[Path]:
    """A run's temporary folder, with the hosts' files and a place for MPI's files."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    try:
        with open(folder / _LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # held while this process lives
            _fill(folder, hosts)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers() -> list[Path]:
    """Remove folders of killed runs; returns them."""
    candidates = sorted(Path(tempfile.gettempdir()).glob(_PREFIX + "*"))
    found = [folder for folder in candidates if _is_left(folder)]
    for folder in found:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _is_left(folder: Path) -> bool:
    """Whether this user made the folder and its run has ended."""
    try:
        if folder.lstat().st_uid != os.geteuid():
            return False
        with open(folder / _LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileNotFoundError, BlockingIOError):  # the run is just ending, just starting, or active
        return False
    return True


def _fill(folder: Path, hosts: Sequence[Host]) -> None:
    lines = ["127.0.0.1 localhost\n", *(f"{host.address} {host.name}\n" for host in hosts)]
    (folder / "etc-hosts").write_text("".join(lines))
    (folder / "tmp").mkdir()
    (folder / "bin").mkdir()
    agent = folder / "bin" / "ssh"
    words = [sys.executable, "-S", "-E", login.__file__, str(folder)]
    agent.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    agent.chmod(0o755)
    if not os.access(agent, os.X_OK):
        raise ClusterError(
            f"programs in {folder.parent} cannot be started (it is mounted noexec), expected a "
            "folder where they can: set TMPDIR to one"
        )
