"""Files that are complete or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file that gets its name only when it is complete and on disk.

    If the process or the machine fails before, a file of that name stays as it was.

    Args:
        path: its folder exists.
        write: gets the open binary file.

    Raises:
        OSError: the file cannot be written; then no part of it is left.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Put the file's name on disk, too; not all systems can open a folder."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
