"""Virtual clusters carry jobs unchanged, as slowly as they should, and count what is sent."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from clusters import CLUSTER, run_in_cluster
from launching import PROGRAMS
from processes import BIN, JobFailed, run_job

pytestmark = [pytest.mark.parallel, pytest.mark.root]

EXAMPLES = Path(__file__).parents[2] / "examples"
MPIRUN = str(BIN / "mpirun")


@pytest.mark.alone
def test_tcp_has_the_rate_both_ways_and_no_long_queue(tmp_path: Path) -> None:
    rates = {"node1": 200e6, "node2": 100e6, "node3": 20e6}
    pairs = ["node1:node2", "node1:node3", "node3:node1"]
    program = [sys.executable, str(PROGRAMS / "tcp_rates.py"), ",".join(pairs)]
    options = ["--hosts", "3", "--rate", "200mbit,100mbit,20mbit"]
    printed, found = run_in_cluster(options, program, tmp_path)
    assert [host["bits_per_second"] for host in found["hosts"]] == list(rates.values())
    for pair, times in json.loads(printed.splitlines()[0]).items():
        limit = min(rates[name] for name in pair.split(":"))
        measured = [time["rate"] for time in times]
        # What else runs on this machine can keep a stream below its rate; nothing lifts it above.
        assert 0.9 * limit < max(measured) < limit, f"{pair}: {measured}"
        queued = min(time["busy"] - time["idle"] for time in times)
        assert queued < 0.05, "two queues of 25 ms"


def test_hosts_differ_as_hosts_do(tmp_path: Path) -> None:
    ask = "hostname; ip -4 -o addr show; ls /sys/class/net; touch /dev/shm/mine; ls /dev/shm; "
    ask += "test -e counters-are-shared && echo shared"
    script = f"cd {tmp_path}; touch counters-are-shared; {ask}; ssh node2 'cd {tmp_path}; {ask}'"
    printed, found = run_in_cluster(["--hosts", "2"], ["sh", "-c", script], tmp_path)
    for name, address in (("node1", "10.77.0.1"), ("node2", "10.77.0.2")):
        assert f"{name}\n" in printed
        assert f"eth0    inet {address}/24" in printed
    assert printed.count("eth0\nlo\nmine\nshared\n") == 2
    assert [host["name"] for host in found["hosts"]] == ["node1", "node2"]
    assert not Path("/dev/shm/mine").exists()


@pytest.mark.parametrize("how", ["--mpi", "--gloo"])
def test_horovodrun_trains_on_several_hosts(how: str, tmp_path: Path) -> None:
    script = [sys.executable, str(EXAMPLES / "torch_minimal.py")]
    command = [str(BIN / "horovodrun"), how, "-np", "2", "-H", "node1:1,node2:1", *script]
    printed, found = run_in_cluster(["--hosts", "2", "--rate", "100mbit"], command, tmp_path)
    accuracy, sent = re.findall(r"accuracy ([\d.]+), sent (\d+) bytes", printed)[0]
    assert float(accuracy) > 0.88
    for host in found["hosts"]:
        assert host["payload_out"] > int(sent), "every host has sent its part"


@pytest.mark.parametrize("outside", [{}, {"OMPI_MCA_plm": "isolated"}])
def test_addresses_work_where_names_do(outside: dict[str, str], tmp_path: Path) -> None:
    """Also where the machine has no ssh, so that mpirun was told outside to start no daemons."""
    horovodrun, ranks = str(BIN / "horovodrun"), "-np 2 -H 10.77.0.1:1,10.77.0.2:1 hostname"
    calls = [
        "ssh root@10.77.0.2 hostname",
        f"{MPIRUN} -np 3 --host node1:1,10.77.0.2:2 hostname",
        f"{horovodrun} --mpi {ranks}",
        f"{horovodrun} --gloo {ranks}",
    ]
    script = " && ".join(f"({call}; echo end)" for call in calls)
    printed, _ = run_in_cluster(["--hosts", "2"], ["sh", "-c", script], tmp_path, **outside)
    parts = printed.split("end\n")[: len(calls)]
    line = re.compile(r"^(?:\[[\d,]+\]<stdout>:)?(node\d)$", re.MULTILINE)
    found = [sorted(line.findall(part)) for part in parts]
    both = ["node1", "node2"]
    assert found == [["node2"], ["node1", "node2", "node2"], both, both], printed


def test_a_server_and_workers_on_hosts_of_their_own(tmp_path: Path) -> None:
    server = [sys.executable, "-m", "ef_horovod.server.launch", "-s", "1", "-w", "2"]
    script = [sys.executable, str(EXAMPLES / "server_numpy.py")]
    command = [*server, "-H", "node1:1,node2:1,node3:1", "--", *script]
    printed, found = run_in_cluster(["--hosts", "3", "--rate", "100mbit"], command, tmp_path)
    assert float(re.findall(r"distance to the solution ([\d.]+)", printed)[-1]) < 0.01
    one, *workers = found["hosts"]
    for way, back in (("payload_out", "payload_in"), ("payload_in", "payload_out")):
        assert one[way] == pytest.approx(sum(worker[back] for worker in workers), rel=0.02)
    a, b = (worker["payload_out"] for worker in workers)
    assert a == pytest.approx(b, rel=0.1), "workers send alike, to the server alone"


@pytest.mark.alone
def test_interfaces_count_what_the_library_counts(tmp_path: Path) -> None:
    shares = {"dense": 1.0, "topk": 0.08}
    program = [sys.executable, str(PROGRAMS / "wire_truth.py"), str(tmp_path), *shares]
    command = [MPIRUN, "-np", "2", "-H", "node1:1,node2:1", *program]
    options = ["--hosts", "2", "--rate", "1gbit"]
    _, found = run_in_cluster(options, command, tmp_path, WIRE_DEVICE="eth0")
    for rank, host in enumerate(found["hosts"]):
        results = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for method, share in shares.items():
            result = results[method]
            steps = result["kernel"] - result["control"]
            assert steps == pytest.approx(result["library"], rel=0.05)
            dense = 4 * result["elements"] * result["steps"]
            assert result["library"] <= share * dense
        # The whole run has MPI's start in it as well, and control traffic all the time.
        library = sum(result["library_since_start"] for result in results.values())
        assert 0 < host["payload_out"] - library < 0.05 * library + 2e6


@pytest.mark.alone
def test_delay_works_or_says_what_the_kernel_lacks(tmp_path: Path) -> None:
    program = [sys.executable, str(PROGRAMS / "tcp_rates.py"), "node1:node2"]
    options = ["--hosts", "2", "--rate", "100mbit", "--delay", "20ms"]
    has_netem = _kernel_has("netem")
    try:
        printed, _ = run_in_cluster(options, program, tmp_path)
    except JobFailed as failure:
        printed = str(failure)
    if has_netem:
        times = json.loads(printed.splitlines()[0])["node1:node2"]
        assert 0.04 < min(time["idle"] for time in times) < 0.06
    else:
        assert "--delay needs the queueing discipline netem, which this kernel" in printed
        assert not list(tmp_path.iterdir())


def _kernel_has(discipline: str) -> bool:
    words = ["unshare", "-n", "tc", "qdisc", "add", "dev", "lo", "root", discipline]
    return subprocess.run(words, capture_output=True).returncode == 0


def test_two_clusters_at_once_do_not_meet(tmp_path: Path) -> None:
    inner = [*CLUSTER, "--hosts", "2", "--", "sh", "-c", "ssh node2 hostname; ls /sys/class/net"]
    script = 'ssh node3 hostname; "$@"; ssh node3 hostname'
    printed, _ = run_in_cluster(["--hosts", "3"], ["sh", "-c", script, "sh", *inner], tmp_path)
    assert printed.startswith("node3\nnode2\neth0\nlo\n")
    assert printed.count("node3\n") == 2


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (["sh", "-c", "exit 7"], 7, "node2"),
        (["sh", "-c", "kill -9 $$"], 137, "node2"),
        (["no-such-program"], 1, "cannot start 'no-such-program'"),
        (
            ["ssh", "node9", "true"],
            1,
            "got the host 'node9', expected one of this cluster: node1 (10.77.0.1)",
        ),
    ],
)
def test_the_status_is_the_commands(command, status, said, tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match=f"ended with {status}:") as failure:
        run_job([*CLUSTER, "--hosts", "2", "--", *command], environment={"TMPDIR": str(tmp_path)})
    assert said in str(failure.value)
    assert not list(tmp_path.iterdir())
