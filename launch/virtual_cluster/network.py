"""Hosts on a switch: interfaces, token buckets and counters, by iproute2 and /proc."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from virtual_cluster import ClusterError
from virtual_cluster.namespaces import network_of

MOST_HOSTS = 250
INTERFACE = "eth0"
_SWITCH = "switch"

_FRAME_NBYTES = 1514  # an Ethernet frame with 1500 bytes, as the kernel counts it
_HEADERS_NBYTES = 66  # Ethernet 14, IPv4 20, TCP 20 and its time stamps 12
# tc's messages for a queueing discipline that the kernel lacks; older kernels give the second.
_UNKNOWN = ("qdisc kind is unknown", "No such file or directory")


@dataclass(frozen=True)
class Host:
    """The settings of a host.

    Attributes:
        number: from 1.
        rate: of its link, each way, in bits per second; None for no limit.
    """

    number: int
    rate: int | None

    @property
    def name(self) -> str:
        return f"node{self.number}"

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number}"


@dataclass(frozen=True)
class Counters:
    """Traffic of a host's interface; bytes count whole Ethernet frames."""

    bytes_out: int
    packets_out: int
    bytes_in: int
    packets_in: int

    @property
    def payload_out(self) -> int:
        """Bytes sent without headers, as if all packets were TCP."""
        return max(0, self.bytes_out - _HEADERS_NBYTES * self.packets_out)

    @property
    def payload_in(self) -> int:
        """Bytes received without headers, as if all packets were TCP."""
        return max(0, self.bytes_in - _HEADERS_NBYTES * self.packets_in)

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "payload_out": self.payload_out, "payload_in": self.payload_in}


def read_delay(text: str) -> str:
    """A time with its unit, in the format of `tc`.

    >>> read_delay("10ms")
    '10ms'

    Raises:
        ValueError: the text is not such a time.
    """
    if not re.fullmatch(r"\d+(\.\d+)?(us|ms|s)", text):
        raise ValueError(f"got the delay {text!r}, expected a time such as 10ms, 500us or 0.1s")
    return text


def bucket(rate: int) -> tuple[int, int]:
    """Size of a token bucket and of the queue in front of it, in bytes.

    The bucket's bytes may go at full speed after a pause. It is 1 ms of the rate, so that short
    messages are slowed down too, but at least ten frames. The queue holds 25 ms of the rate, but at
    least 32 frames.

    >>> bucket(100_000_000)
    (15140, 312500)
    """
    per_second = rate // 8
    return (
        max(per_second // 1000, 10 * _FRAME_NBYTES),
        max(per_second // 40, 32 * _FRAME_NBYTES),
    )


def connect(hosts: Sequence[Host], pids: Sequence[int], delay: str | None) -> None:
    """Make a switch in this network namespace and connect hosts that have namespaces already.

    Args:
        hosts: to connect.
        pids: of a process in each host.
        delay: of every packet that a host sends, from `read_delay`; None for no delay.

    Raises:
        ClusterError: the kernel lacks a feature, or refuses.
    """
    _require_disciplines(hosts, delay)
    _without_ipv6()
    # Without snooping and spanning tree a bridge sends nothing by itself.
    lines = [f"link add {_SWITCH} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"]
    for host, pid in zip(hosts, pids, strict=True):
        peer = f"peer name {INTERFACE} netns {pid}"
        lines.append(f"link add {host.name} type veth {peer}")
        lines.append(f"link set {host.name} master {_SWITCH} up")
    _batch("ip", [*lines, f"link set {_SWITCH} up"])
    _batch("tc", [line for host in hosts for line in _shaping(host.name, host.rate, None)])
    for host, pid in zip(hosts, pids, strict=True):
        with network_of(pid):
            _without_ipv6()
            address = f"addr add {host.address}/24 dev {INTERFACE}"
            _batch("tc", _shaping(INTERFACE, host.rate, delay))
            _batch("ip", ["link set lo up", address, f"link set {INTERFACE} up"])


def change_rate(rate: int) -> None:
    """Change the rate of the caller's host, both ways; only for clusters without `--delay`.

    For programs inside a cluster that measure at several rates. Connections stay open. Queued
    packets continue at the new rate.

    Args:
        rate: in bits per second, from `read_rate`.

    Raises:
        ClusterError: the caller is not on a host of a cluster.
    """
    name = socket.gethostname()
    if _SWITCH not in _links_of(1):
        raise ClusterError(f"{name} is no host of a cluster; start this in launch/cluster")
    replace = [
        line.replace("qdisc add", "qdisc replace") for line in _shaping(INTERFACE, rate, None)
    ]
    _batch("tc", replace)
    with network_of(1):  # process 1 of a cluster has the switch
        _batch("tc", [line.replace(f"dev {INTERFACE} ", f"dev {name} ") for line in replace])


def _links_of(pid: int) -> set[str]:
    """Names of the interfaces in a process' network; empty if it is not accessible."""
    try:
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()
    except OSError:
        return set()
    return {line.partition(":")[0].strip() for line in lines if ":" in line}


def counters(pid: int | str) -> Counters:
    """Counters of the host that a process is on; "self" is the caller."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == INTERFACE:
            numbers = [int(number) for number in rest.split()]
            return Counters(numbers[8], numbers[9], numbers[0], numbers[1])
    raise ClusterError(f"found no interface {INTERFACE} in process {pid}, expected the host's")


def _shaping(device: str, rate: int | None, delay: str | None) -> list[str]:
    """Lines for tc: delay the packets that leave a device, then limit their rate."""
    lines, place = [], "root handle 1:"
    if delay:
        lines.append(f"qdisc add dev {device} {place} netem delay {delay} limit 100000")
        place = "parent 1:1 handle 2:"
    if rate:
        burst, queue = bucket(rate)
        # tc's limit includes waiting packets and the bucket.
        lines.append(
            f"qdisc add dev {device} {place} tbf rate {rate}bit burst {burst} limit {queue + burst}"
        )
    return lines


def _require_disciplines(hosts: Sequence[Host], delay: str | None) -> None:
    """Try the queueing disciplines that the kernel may lack, on lo, which is unused here."""
    needs = {"--delay": "netem delay 1ms"} if delay else {}
    if any(host.rate for host in hosts):
        needs["--rate"] = "tbf rate 1mbit burst 10kb limit 10kb"
    for option, words in needs.items():
        try:
            _batch("tc", [f"qdisc add dev lo root {words}", "qdisc del dev lo root"])
        except ClusterError as error:
            if not any(text in str(error) for text in _UNKNOWN):
                raise
            kind = words.split()[0]
            raise ClusterError(
                f"{option} needs the queueing discipline {kind}, which this kernel does not have: "
                f"leave out {option}, or take a kernel with CONFIG_NET_SCH_{kind.upper()} ({error})"
            ) from error


def _without_ipv6() -> None:
    """Switch IPv6 off where possible, because it sends additional packets."""
    for scope in ("all", "default"):
        switch = Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6")
        try:
            switch.write_text("1")
        except OSError:
            return


def _batch(tool: str, lines: Sequence[str]) -> None:
    if not lines:
        return
    text = "\n".join(lines) + "\n"
    done = subprocess.run([tool, "-batch", "-"], input=text, capture_output=True, text=True)
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"status {done.returncode}"
        way_out = "; in a container, start it with --privileged" if "not permitted" in said else ""
        raise ClusterError(f"`{tool}` refused one of {'; '.join(lines)}: {said}{way_out}")
