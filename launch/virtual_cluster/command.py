"""The command: checks requirements, starts the cluster's first process, shows the counters."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ef_horovod.common.arguments import argument
from ef_horovod.common.units import read_rate, show_rate
from virtual_cluster import ClusterError, inside, namespaces
from virtual_cluster.folder import remove_leftovers, run_folder
from virtual_cluster.network import MOST_HOSTS, Host, read_delay
from virtual_cluster.signals import Signals, exit_status, was_sent

_EPILOG = """
COMMAND runs on node1, in this folder; the hosts are node1, node2, ... with all files of this
machine, and `ssh node2` works among them. So horovodrun and mpirun do as on a cluster:

    launch/cluster --hosts 2 --rate 100mbit -- \\
        horovodrun -np 2 -H node1:1,node2:1 python examples/torch_minimal.py

In the end it shows what went through each host's interface. docs/cluster.md has more.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command in a cluster; returns its exit status, or 1 with an error message."""
    parser = make_parser()
    try:
        arguments, plan = _read(parser, sys.argv[1:] if argv is None else argv)
        if plan is None:
            return _clean()
        remove_leftovers()
        report = _run(plan)
    except ClusterError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    if "counters" in report:
        _show(plan, report, arguments.json)
    return int(report["status"])


def check(words: Sequence[str], more: str = "") -> int | None:
    """Check whether a cluster is possible; returns None, or the status to end with.

    `launch/cluster` runs it with any Python, so that help, wrong options, a missing tool and
    `--clean` need no installation.

    Args:
        words: of the command line.
        more: text appended to the help.
    """
    parser = make_parser(more)
    try:
        _, plan = _read(parser, words)
        return _clean() if plan is None else None
    except ClusterError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1


def _read(
    parser: argparse.ArgumentParser, words: Sequence[str]
) -> tuple[argparse.Namespace, inside.Plan | None]:
    """The options, and the plan of a possible cluster; None with `--clean`."""
    cut = list(words).index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:cut])
    if arguments.clean:
        return arguments, None
    plan = _plan(parser, arguments, list(words[cut + 1 :]))
    _require_root_and_tools()
    return arguments, plan


def make_parser(more: str = "") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/cluster",
        usage="%(prog)s --hosts N [--rate RATE] [--delay TIME] [--json FILE] -- COMMAND\n"
        "       %(prog)s --clean",
        description="Run a command in a cluster of virtual hosts on this machine. Needs root.",
        epilog=_EPILOG + (f"\n{more}\n" if more else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--hosts", type=argument(_read_count), metavar="N")
    parser.add_argument(
        "--rate",
        type=argument(_read_rates),
        metavar="RATE",
        help="of each host's link, each way: 100mbit, or one for each host: 1gbit,1gbit,100mbit",
    )
    parser.add_argument(
        "--delay",
        type=argument(read_delay),
        metavar="TIME",
        help="of each packet: 5ms makes a round trip of 10 ms (the kernel must have netem)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the counters to this file, too"
    )
    parser.add_argument(
        "--clean", action="store_true", help="remove what a killed run left, and do nothing else"
    )
    return parser


def _plan(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, command: list[str]
) -> inside.Plan:
    if arguments.hosts is None:
        parser.error("got no --hosts, expected their number: --hosts 4")
    if not command:
        parser.error("got no command, expected one after --: -- horovodrun ...")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"got --json {arguments.json}, expected a file in a folder that exists")
    rates = arguments.rate or [None]
    if len(rates) == 1:
        rates = rates * arguments.hosts
    if len(rates) != arguments.hosts:
        parser.error(
            f"got {len(rates)} rates for {arguments.hosts} hosts, expected one, or one each"
        )
    hosts = [Host(number, rate) for number, rate in enumerate(rates, 1)]
    return inside.Plan(hosts, arguments.delay, command)


def _require_root_and_tools() -> None:
    if sys.platform != "linux":
        raise ClusterError(f"this is {sys.platform}, expected Linux: hosts are namespaces of it")
    if os.geteuid() != 0:
        raise ClusterError(
            f"network namespaces need root, this is user {os.geteuid()}: take sudo, or a container"
        )
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise ClusterError(
                f"needs `ip` and `tc` of iproute2, found no {tool!r}: apt-get install iproute2"
            )


def _clean() -> int:
    for folder in remove_leftovers():
        print(f"removed {folder}")
    return 0


def _run(plan: inside.Plan) -> dict[str, Any]:
    """Start process 1 in a new PID namespace and wait for it; returns its report.

    Raises:
        ClusterError: the cluster could not be made.
    """
    signals = Signals()
    with run_folder(plan.hosts) as folder:
        source, sink = os.pipe()
        try:
            namespaces.unshare(namespaces.PIDS)
        except OSError as error:
            raise namespaces.refused(error) from error
        child = os.fork()
        if child == 0:
            inside.main(plan, folder, signals, sink)
        os.close(sink)
        status = _wait(child, signals)
        with os.fdopen(source, "rb") as file:
            text = file.read()
    report: dict[str, Any] = json.loads(text) if text else {"status": status}
    if "error" in report:
        raise ClusterError(report["error"])
    if "counters" not in report:
        print("the cluster was killed: its counters are lost", file=sys.stderr)
    return report


def _wait(child: int, signals: Signals) -> int:
    """Wait for process 1, pass signals on to it, and return its status."""
    while True:
        found = signals.next()
        if found is None or found.si_signo == signal.SIGCHLD:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return exit_status(status)
        elif was_sent(found):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, found.si_signo)


def _show(plan: inside.Plan, report: dict[str, Any], file: Path | None) -> None:
    """Print the table to stderr, because stdout belongs to the command."""
    from tabulate import tabulate  # `check` does not need it

    names = ("bytes out", "packets out", "payload out", "bytes in", "packets in", "payload in")
    rows = [
        [host.name, show_rate(host.rate), *(f"{counts[_key(name)]:,}" for name in names)]
        for host, counts in zip(plan.hosts, report["counters"], strict=True)
    ]
    align = ("left", "right") + ("right",) * len(names)
    table = tabulate(rows, ["host", "rate", *names], disable_numparse=True, colalign=align)
    print(f"\n{table}", file=sys.stderr)
    if file is not None:
        file.write_text(json.dumps(_as_json(plan, report), indent=1) + "\n")


def _as_json(plan: inside.Plan, report: dict[str, Any]) -> dict[str, Any]:
    hosts = [
        {"name": host.name, "address": host.address, "bits_per_second": host.rate, **counts}
        for host, counts in zip(plan.hosts, report["counters"], strict=True)
    ]
    return {
        "command": list(plan.command),
        "status": report["status"],
        "seconds": report["seconds"],
        "delay": plan.delay,
        "hosts": hosts,
    }


def _key(column: str) -> str:
    return column.replace(" ", "_")


def _read_count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number <= MOST_HOSTS:
        raise ValueError(f"got {text!r}, expected an integer from 1 to {MOST_HOSTS}")
    return number


def _read_rates(text: str) -> list[int]:
    return [read_rate(word) for word in text.split(",")]
