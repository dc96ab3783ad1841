"""A server's error-feedback state on disk: one file per server and step, written atomically.

    FOLDER/step-000000120/server-0.npz    float32 vectors, named "BUCKET/FIELD"

The files do not depend on the number of servers. Each server reads its buckets from all files of
the step.
"""

from __future__ import annotations

import shutil
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ef_horovod.common.files import write_atomically
from ef_horovod.errors import ConfigMismatchError

_KEPT = 3  # steps kept per folder; older ones are removed
_FINGERPRINT = "fingerprint"


def save(folder: Path, step: int, server: int, fingerprint: int, state: Mapping[str, Any]) -> Path:
    """Write the results of `ServedBucket.to_save` of all buckets; returns the file.

    The file gets its name only when it is complete and on disk. If the process dies before, the
    last checkpoint stays intact.
    """
    place = folder / f"step-{step:09d}"
    place.mkdir(parents=True, exist_ok=True)
    target = place / f"server-{server}.npz"
    write_atomically(
        target,
        lambda file: np.savez(file, **{_FINGERPRINT: np.uint64(fingerprint)}, **state),
    )
    for old in sorted(steps_in(folder))[:-_KEPT]:
        shutil.rmtree(folder / f"step-{old:09d}", ignore_errors=True)
    return target


def steps_in(folder: Path) -> list[int]:
    """Steps with a complete or partial checkpoint."""
    places = folder.glob("step-*") if folder.is_dir() else ()
    return sorted(int(place.name[5:]) for place in places if place.name[5:].isdecimal())


def load(
    folder: Path | None, step: int, fingerprint: int, buckets: Iterable[str]
) -> dict[str, Any]:
    """State of the named buckets after `step` steps, as passed to `save`.

    Raises:
        ConfigMismatchError: there is no checkpoint of this step, this config or these buckets, or a
            file is damaged.
    """
    if folder is None or step not in steps_in(folder):
        where = "no --checkpoint" if folder is None else f"checkpoints of steps {steps_in(folder)}"
        raise ConfigMismatchError(
            f"the workers continue with step {step} and the server has {where}, expected one of "
            "the same step; start from checkpoints of the same step, or all anew"
        )
    found: dict[str, Any] = {}
    for file in sorted((folder / f"step-{step:09d}").glob("server-*.npz")):
        content = _read(file)
        if int(content.pop(_FINGERPRINT)) != fingerprint:
            raise ConfigMismatchError(
                f"the checkpoint {file} is of another model or compression than the workers' "
                "(fingerprints differ), expected the same; name another folder"
            )
        found |= content
    missing = [name for name in buckets if f"{name}/" not in found]
    if missing:
        raise ConfigMismatchError(
            f"the checkpoint of step {step} in {folder} lacks the buckets {missing[:4]}, expected "
            "the files of all servers there; copy them from the other servers' hosts"
        )
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        with np.load(file) as content:
            read = {key: content[key] for key in content.files}
            return {_FINGERPRINT: read.pop(_FINGERPRINT), **read}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigMismatchError(
            f"the checkpoint {file} cannot be read ({error!r}), expected what a server has "
            "written; copy it again, or start all from an earlier step"
        ) from None
