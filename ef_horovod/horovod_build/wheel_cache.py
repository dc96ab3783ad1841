"""The cache of Horovod's wheels: one folder per key, one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ef_horovod.horovod_build.toolkit import BuildError


def default_cache(environment: Mapping[str, str]) -> Path:
    base = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ef_horovod"


def require_cache(folder: Path) -> None:
    """Create the cache's folder, and raise if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise BuildError(
            f"got {folder} for the cache of wheels, where nothing can be written "
            f"({error.strerror or error}), expected a folder that can be made and written to: name "
            "another one with --cache, or its parent in XDG_CACHE_HOME"
        ) from None


def folder_name(key: Mapping[str, str]) -> str:
    """A readable name, made unique by a hash of the whole key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    readable = [f"horovod-{key['horovod']}", key["python"].split("-x86")[0]]
    readable += [
        f"{name.removeprefix('framework ')}-{version}"
        for name, version in key.items()
        if name.startswith("framework ")
    ]
    return re.sub(r"[^\w.+-]", "", "_".join([*readable, digest]))


def cached_wheel(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("*.whl"))), None)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a wheel's build; other processes wait and then find the wheel in the cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another process builds the same wheel, waiting for it", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def publish(wheel: Path, folder: Path, key: Mapping[str, str]) -> Path:
    """Move a finished wheel into the cache atomically: the folder is complete or absent."""
    fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    shutil.copy2(wheel, fresh)
    (fresh / "key.json").write_text(json.dumps(key, indent=2) + "\n")
    if folder.exists():  # --rebuild
        old = Path(tempfile.mkdtemp(prefix=".old-", dir=folder.parent))
        folder.rename(old / "wheel")
        fresh.rename(folder)
        shutil.rmtree(old)
    else:
        fresh.rename(folder)
    folder.chmod(0o755)  # mkdtemp creates it private
    return folder / wheel.name
