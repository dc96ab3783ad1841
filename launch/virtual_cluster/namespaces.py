"""Namespaces, mounts and similar kernel calls that Python 3.10 lacks."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

from virtual_cluster import ClusterError
from virtual_cluster.login import call, join

MOUNTS, NAMES, IPC, PIDS, NETWORK = 0x00020000, 0x04000000, 0x08000000, 0x20000000, 0x40000000
_PRIVATE, _RECURSIVE, _BIND = 1 << 18, 1 << 14, 1 << 12
_PR_SET_PDEATHSIG = 1


def unshare(kinds: int) -> None:
    """Move to new namespaces of these kinds; with `PIDS`, only later children move.

    Raises:
        OSError: the kernel does not allow it.
    """
    call("unshare", kinds)


def refused(error: OSError) -> ClusterError:
    """The error if root may not make namespaces on this machine."""
    return ClusterError(
        f"this machine does not let root make namespaces ({error}): in a container, start it with "
        "--privileged"
    )


def mount(source: str, target: str, kind: str, data: str = "") -> None:
    """Mount a file system of this kind.

    Raises:
        OSError: the kernel does not allow it; the error names the target.
    """
    _mount(source, target, kind, 0, data)


def bind(source: str, target: str) -> None:
    """Show a file or folder at another place."""
    _mount(source, target, "", _BIND, "")


def keep_mounts_private() -> None:
    """Keep later mounts in this mount namespace."""
    _mount("none", "/", "", _PRIVATE | _RECURSIVE, "")


def _mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    texts = [os.fsencode(text) for text in (source, target, kind, data)]
    call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3], about=target)


def end_with_parent() -> None:
    """Make the kernel kill this process when its parent ends in any way."""
    call("prctl", _PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


@contextlib.contextmanager
def network_of(pid: int) -> Iterator[None]:
    """Inside, this process is in another process' network."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        join(pid, ["net"])
        yield
    finally:
        call("setns", own, 0)
        os.close(own)
