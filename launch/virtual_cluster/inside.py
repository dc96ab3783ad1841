"""The first process of a cluster: makes the hosts and runs the command.

It is process 1 of a PID namespace. When it ends, the kernel ends all processes of the cluster.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ef_horovod.common.openmpi import set_prefix
from virtual_cluster import ClusterError, namespaces
from virtual_cluster.login import PIDS, join
from virtual_cluster.network import Host, connect, counters
from virtual_cluster.signals import Signals, exit_status, was_sent

_SECONDS_TO_END = 30.0  # for a command that got a signal; servers save their state then
_SECONDS_TO_LEAVE = 3.0  # for processes that outlive the command: mpirun's daemons clean up


@dataclass(frozen=True)
class Plan:
    """A run: hosts, `read_delay`'s text or None, and the command for the first host."""

    hosts: Sequence[Host]
    delay: str | None
    command: Sequence[str]


def main(plan: Plan, folder: Path, signals: Signals, report: int) -> NoReturn:
    """Run as process 1; writes a report as JSON to the file descriptor `report`."""
    status, found = 1, {}
    try:
        namespaces.end_with_parent()
        found = _run(plan, folder, signals)
        status = found["status"]
    except (ClusterError, OSError) as error:
        found = {"error": str(error)}
    finally:
        os.write(report, json.dumps(found).encode())
        os._exit(status)


def _run(plan: Plan, folder: Path, signals: Signals) -> dict[str, Any]:
    try:
        namespaces.unshare(namespaces.MOUNTS | namespaces.NETWORK)
        namespaces.keep_mounts_private()
        namespaces.mount("proc", "/proc", "proc")
    except OSError as error:
        raise namespaces.refused(error) from error
    environment = login_environment(os.environ, folder)
    _hide_horovod_cache(folder)
    pids = [_start_host(host, folder, environment) for host in plan.hosts]
    places = zip(plan.hosts, pids, strict=True)
    lines = [f"{host.name} {host.address} {pid}\n" for host, pid in places]
    (folder / PIDS).write_text("".join(lines))
    connect(plan.hosts, pids, plan.delay)
    begin = time.monotonic()
    command = _start_command(plan.command, pids[0], environment, signals)
    status = _wait(command, pids, signals)
    _let_leave(pids)
    seconds = time.monotonic() - begin
    rows = [counters(pid).as_dict() for pid in pids]
    return {"status": status, "seconds": seconds, "counters": rows}


def login_environment(outside: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Variables of every login on a host, from those of the cluster's caller."""
    environment = dict(outside)
    agent = str(folder / "bin" / "ssh")
    search = environment.get("PATH", os.defpath)
    environment["PATH"] = os.pathsep.join([str(folder / "bin"), search])
    # Outside it may be "isolated" if there is no ssh; then all ranks would run on the first host.
    environment["OMPI_MCA_plm"] = "rsh"
    environment["OMPI_MCA_plm_rsh_agent"] = agent
    environment["OMPI_MCA_orte_tmpdir_base"] = str(folder / "tmp")
    # All hosts share the cores: ranks must not bind to them, or hold them while waiting.
    environment.setdefault("OMPI_MCA_hwloc_base_binding_policy", "none")
    environment.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    environment.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
    environment.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    set_prefix(environment)  # otherwise Open MPI's wheel does not find its files on another host
    return environment


def _hide_horovod_cache(folder: Path) -> None:
    """Hide horovodrun's cache of host facts by name, which is wrong for these hosts."""
    cache = Path.home() / ".horovod"
    if cache.is_dir():
        (folder / "horovod").mkdir()
        namespaces.bind(str(folder / "horovod"), str(cache))


def _start_host(host: Host, folder: Path, environment: dict[str, str]) -> int:
    """Start a process that holds the host's namespaces; its variables are those of a login."""

    def become() -> None:
        os.setsid()
        kinds = namespaces.MOUNTS | namespaces.NETWORK | namespaces.NAMES | namespaces.IPC
        namespaces.unshare(kinds)
        socket.sethostname(host.name)
        namespaces.bind(str(folder / "etc-hosts"), "/etc/hosts")
        namespaces.mount("sysfs", "/sys", "sysfs")  # its /sys/class/net shows this network
        if os.path.isdir("/dev/shm"):
            namespaces.mount("tmpfs", "/dev/shm", "tmpfs", "mode=1777")
        os.execvpe("sleep", ["sleep", "infinity"], environment)

    pid, problem = _fork(become)
    if problem:
        raise ClusterError(f"cannot make the host {host.name}: {problem}")
    return pid


def _start_command(
    words: Sequence[str], host: int, environment: dict[str, str], signals: Signals
) -> int:
    here = os.getcwd()

    def become() -> None:
        join(host)
        os.chdir(here)
        signals.deliver()
        program = shutil.which(words[0], path=environment["PATH"]) or words[0]
        os.execve(program, list(words), environment)

    pid, problem = _fork(become)
    if problem:
        raise ClusterError(f"cannot start {words[0]!r}: {problem}")
    return pid


def _fork(become: Callable[[], None]) -> tuple[int, str]:
    """Fork a child that becomes another program; returns its PID and the error ('' if none)."""
    answer, tell = os.pipe()  # the kernel closes it when the other program starts
    pid = os.fork()
    if pid == 0:
        try:
            become()
        except BaseException as error:
            os.write(tell, str(error).encode())
        finally:
            os._exit(127)
    os.close(tell)
    with os.fdopen(answer, "rb") as file:
        return pid, file.read().decode()


def _wait(command: int, hosts: Sequence[int], signals: Signals) -> int:
    """Wait for the command, pass signals on to it, and return its status."""
    limit: float | None = None
    while True:
        found = signals.next(None if limit is None else limit - time.monotonic())
        if found is None:
            os.kill(command, signal.SIGKILL)
            limit = None
        elif found.si_signo == signal.SIGCHLD:
            ended = _reap()
            if command in ended:
                return exit_status(ended[command])
        elif was_sent(found):
            again = limit is not None
            _pass_on(signal.SIGKILL if again else found.si_signo, command, hosts)
            limit = time.monotonic() + _SECONDS_TO_END


def _reap() -> dict[int, int]:
    """Children that ended, including orphans, with their statuses."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = status


def _pass_on(kind: int, command: int, hosts: Sequence[int]) -> None:
    """Send a signal to the command; an interrupt to its whole process group, like a terminal."""
    aims = [command]
    if kind == signal.SIGINT:
        aims += [pid for pid in _others(hosts) if pid != command and os.getpgid(pid) == 0]
    for pid in aims:
        try:
            os.kill(pid, kind)
        except ProcessLookupError:  # just ended
            continue


def _let_leave(hosts: Sequence[int]) -> None:
    """Wait a short time for the command's remaining processes to end."""
    limit = time.monotonic() + _SECONDS_TO_LEAVE
    while _others(hosts) and time.monotonic() < limit:
        time.sleep(0.02)
        _reap()


def _others(hosts: Sequence[int]) -> list[int]:
    """All processes of the cluster except this one and those that hold the hosts."""
    numbers = (int(entry.name) for entry in os.scandir("/proc") if entry.name.isdecimal())
    return [number for number in numbers if number != os.getpid() and number not in hosts]
