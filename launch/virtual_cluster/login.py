"""Replacement of ssh inside a cluster: runs a command on another host.

The file `ssh` that is first on the hosts' PATH runs this file by its path, without the package. So
it starts quickly; it imports only the standard library.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PIDS = "hosts"  # in a run's folder: a line "name address pid" for each host

_KINDS = ("net", "uts", "ipc", "mnt")  # mnt last, because it changes the meaning of paths
_WITH_VALUE = set("BbcDEeFIiJLlmOopQRSWw")  # options of ssh that take one
_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any, about: str | None = None) -> None:
    """Call a function of the C library that returns 0 on success.

    Args:
        name: of the function.
        arguments: passed to ctypes.
        about: file name for the error.

    Raises:
        OSError: the function did not return 0.
    """
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}", about)


def join(pid: int, kinds: Sequence[str] = _KINDS) -> None:
    """Enter the namespaces of a process.

    Raises:
        OSError: the process has ended, or the kernel does not allow it.
    """
    files = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in kinds]
    for file in files:
        call("setns", file, 0)
        os.close(file)


def split(words: Sequence[str]) -> tuple[str, list[str]]:
    """Host and command of an ssh command line; options are dropped.

    >>> split(["-x", "-o", "StrictHostKeyChecking=no", "root@node2", "-p", "22", "echo", "-n"])
    ('node2', ['echo', '-n'])
    """
    host, rest = "", list(words)
    while rest and (rest[0].startswith("-") or not host):
        word = rest.pop(0)
        if not word.startswith("-"):
            host = word.rpartition("@")[2]
        elif word[-1] in _WITH_VALUE and len(word) == 2 and rest:
            rest.pop(0)
    return host, rest


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    lines = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    pairs = (os.fsdecode(line).partition("=") for line in lines if b"=" in line)
    return {name: value for name, _, value in pairs}


def find(text: str, host: str) -> int:
    """The process that holds a host, given by name or address.

    >>> find("node1 10.77.0.1 31\\nnode2 10.77.0.2 32\\n", "10.77.0.2")
    32

    Args:
        text: of the file `PIDS`.
        host: the one to find. If it is unknown, this process ends with an error message.
    """
    hosts = [line.split() for line in text.splitlines()]
    for name, address, pid in hosts:
        if host in (name, address):
            return int(pid)
    known = ", ".join(f"{name} ({address})" for name, address, _ in hosts)
    sys.exit(f"ssh: got the host {host!r}, expected one of this cluster: {known}")


def main(folder: str, words: Sequence[str]) -> None:
    """Become the command, on its host, with the variables of a new login."""
    host, command = split(words)
    pid = find((Path(folder) / PIDS).read_text(), host)
    environment = environment_of(pid)
    join(pid)
    home = environment.get("HOME", "/")
    os.chdir(home if os.path.isdir(home) else "/")
    shell = pwd.getpwuid(os.getuid()).pw_shell or "/bin/sh"
    arguments = ["-c", " ".join(command)] if command else ["-i"]
    os.execve(shell, [shell, *arguments], environment)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
