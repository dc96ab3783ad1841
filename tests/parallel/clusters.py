"""Starts virtual clusters, and looks for what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from processes import ENVIRONMENT, run_job

CLUSTER = [sys.executable, str(Path(__file__).parents[2] / "launch" / "virtual_cluster")]


def run_in_cluster(
    options: Sequence[str], command: Sequence[str], folder: Path, **variables: str
) -> tuple[str, dict[str, Any]]:
    """Run a command on node1; what was printed, and the cluster's JSON.

    Args:
        options: of the cluster.
        command: to run.
        folder: for the JSON and the cluster's own files, which must be gone in the end.
        variables: of the environment, besides the usual ones.

    Raises:
        JobFailed: the command failed, or there can be no cluster here; the message says why.
    """
    file = folder / "counters.json"
    line = [*CLUSTER, *options, "--json", str(file), "--", *command]
    printed = run_job(line, timeout=300, environment={"TMPDIR": str(folder), **variables})
    assert not list(folder.glob("ef-cluster-*"))
    return printed, json.loads(file.read_text())


def start_cluster(command: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """Start a cluster of two hosts that a test will disturb."""
    return subprocess.Popen(
        [*CLUSTER, "--hosts", "2", "--rate", "100mbit", "--", *command],
        env={**os.environ, **ENVIRONMENT, "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def network_state() -> dict[str, Any]:
    """All that a cluster could leave in the machine's network: to compare before and after."""
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    mounts = Path("/proc/mounts").read_text().splitlines()
    ipv6 = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6")
    return {
        "interfaces": [line.split()[1] for line in links.splitlines()],
        "mounts": sorted(line.split()[1] for line in mounts),
        "hosts file": Path("/etc/hosts").read_text(),
        "IPv6": ipv6.read_text() if ipv6.exists() else "",
    }


def processes_with(word: str) -> list[int]:
    """Processes of the whole machine with this word in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdecimal() else []
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        if word.encode() in words:
            found.append(int(entry.name))
    return found
