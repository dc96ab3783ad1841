"""What of a virtual cluster needs no root: its options, its addresses, the words of its errors."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from importlib import machinery, util
from pathlib import Path

import pytest

from ef_horovod.common.units import read_rate
from virtual_cluster import ClusterError, folder, inside, login, network
from virtual_cluster import command as cluster

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "rate"),
    [("64kbit", 64_000), ("100mbit", 10**8), ("2.5Gbit", 2_500_000_000), ("800000bit", 800_000)],
)
def test_rates(text, rate):
    assert read_rate(text) == rate


@pytest.mark.parametrize("text", ["100", "100mbps", "-1mbit", "10kbit", "1e3mbit", "mbit", ""])
def test_what_is_no_rate(text):
    with pytest.raises(ValueError, match="expected 64kbit or more, as in 100mbit"):
        read_rate(text)


@pytest.mark.parametrize(
    ("rate", "milliseconds", "queue_milliseconds"),
    [(10**6, 122, 388), (10**8, 1.3, 25), (10**10, 1, 25)],
)
def test_buckets_and_queues_are_short(rate, milliseconds, queue_milliseconds):
    burst, queue = network.bucket(rate)
    assert burst >= 15_140
    assert 8000 * burst / rate == pytest.approx(milliseconds, rel=0.07)
    assert 8000 * queue / rate == pytest.approx(queue_milliseconds, rel=0.07)


@pytest.mark.parametrize("module", [login, network])
def test_examples_in_docstrings(module):
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


def test_headers_are_taken_off():
    counts = network.Counters(bytes_out=1514_000, packets_out=1000, bytes_in=42, packets_in=1)
    assert counts.payload_out == 1448_000
    assert counts.payload_in == 0, "an ARP packet is shorter than TCP's headers"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--", "true"], "got no --hosts"),
        (["--hosts", "2"], "got no command, expected one after --"),
        (["--hosts", "2", "true"], "unrecognized arguments: true"),
        (["--hosts", "0", "--", "true"], "got '0', expected an integer from 1 to 250"),
        (["--hosts", "2", "--rate", "1mb", "--", "x"], "got the rate '1mb'"),
        (["--hosts", "3", "--rate", "1mbit,2mbit", "--", "x"], "got 2 rates for 3 hosts"),
        (["--hosts", "2", "--json", "/no/x", "--", "x"], "got --json /no/x, expected a file"),
        (["--hosts", "2", "--delay", "5", "--", "x"], "got the delay '5', expected a time such as"),
    ],
)
def test_mistakes(words, problem, capsys):
    with pytest.raises(SystemExit) as left:
        cluster.main(words)
    assert left.value.code == 2
    assert problem in capsys.readouterr().err


def test_without_root(capsys, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cluster.main(["--hosts", "2", "--", "true"]) == 1
    assert capsys.readouterr().err == (
        "launch/cluster: error: network namespaces need root, this is user 1000: "
        "take sudo, or a container\n"
    )


def test_without_iproute2(capsys, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(cluster.shutil, "which", lambda tool: None if tool == "tc" else f"/{tool}")
    assert cluster.main(["--hosts", "2", "--", "true"]) == 1
    assert "found no 'tc': apt-get install iproute2" in capsys.readouterr().err


def test_the_table_and_the_json(capsys, tmp_path):
    hosts = [network.Host(1, 10**8), network.Host(2, None)]
    counts = network.Counters(3028, 2, 132, 2).as_dict()
    report = {"status": 3, "seconds": 1.5, "counters": [counts, counts]}
    cluster._show(inside.Plan(hosts, "5ms", ["true"]), report, tmp_path / "out.json")
    shown = capsys.readouterr()
    assert shown.out == "", "which is the command's"
    _, _, _, first, second = shown.err.splitlines()
    assert first.split() == ["node1", "100", "Mbit/s", "3,028", "2", "2,896", "132", "2", "0"]
    assert second.split() == ["node2", "no", "limit", "3,028", "2", "2,896", "132", "2", "0"]
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["status"], found["delay"], found["command"]) == (3, "5ms", ["true"])
    assert found["hosts"][0]["bits_per_second"] == 10**8
    assert found["hosts"][1]["payload_out"] == 2896
    assert found["hosts"][1]["address"] == "10.77.0.2"


@pytest.mark.parametrize(
    ("words", "host", "command"),
    [
        (["node2", "true"], "node2", ["true"]),
        (["-x", "node2", "PATH=/x:$PATH ; orted -mca a b"], "node2", None),
        (["-o", "A=b", "-oC=d", "node3", "-p", "22", "-i", "key", "cd / ; x"], "node3", None),
        (["-l", "me", "you@node3", "echo", "-p", "node1"], "node3", ["echo", "-p", "node1"]),
        (["node1"], "node1", []),
        ([], "", []),
    ],
)
def test_ssh_command_lines(words, host, command):
    assert login.split(words) == (host, words[-1:] if command is None else command)


def test_the_environment_of_a_login():
    outside = {"PATH": "/bin", "A": "b", "OMPI_MCA_hwloc_base_binding_policy": "core"}
    found = inside.login_environment(outside, Path("/run/x"))
    assert found["PATH"] == "/run/x/bin:/bin"
    assert found["OMPI_MCA_plm_rsh_agent"] == "/run/x/bin/ssh"
    assert found["A"] == "b"
    assert found["OMPI_MCA_hwloc_base_binding_policy"] == "core", "what the user says stays"
    assert outside["PATH"] == "/bin"


def test_folders_of_others_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "ef-cluster-starting").mkdir()  # has no lock yet
    (tmp_path / "another").mkdir()
    ended = tmp_path / "ef-cluster-ended"
    ended.mkdir()
    (ended / "lock").touch()
    with folder.run_folder([network.Host(1, None)]) as own:
        if own.parent != tmp_path:  # mkdtemp asks the module itself
            pytest.fail(f"made {own}")
        assert (own / "etc-hosts").read_text() == "127.0.0.1 localhost\n10.77.0.1 node1\n"
        assert folder.remove_leftovers() == [ended]
        assert own.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"ef-cluster-starting", "another"}


def refuse(monkeypatch, text):
    """The tools refuse, and the machine's own network stays as it is."""
    monkeypatch.setattr(network, "_without_ipv6", lambda: None)
    refusal = subprocess.CompletedProcess([], 1, "", text)
    monkeypatch.setattr(network.subprocess, "run", lambda *words, **options: refusal)


def test_a_refusal_of_the_kernel_has_a_sentence(monkeypatch):
    refuse(monkeypatch, "RTNETLINK answers:\nOperation not permitted\n")
    for rate in (None, 10**6):
        with pytest.raises(ClusterError, match=r"^`.*: Operation not .* start it with --privileg"):
            network.connect([network.Host(1, rate)], [1], None)


@pytest.mark.parametrize(("option", "kind"), [("--rate", "tbf"), ("--delay", "netem")])
def test_a_discipline_that_is_not_there(option, kind, monkeypatch):
    refuse(monkeypatch, "Error: Specified qdisc kind is unknown.\nCommand failed -:1\n")
    host = network.Host(1, 10**6 if option == "--rate" else None)
    words = f"{option} needs .* {kind}, which .* leave out {option}, .*_NET_SCH_{kind.upper()}"
    with pytest.raises(ClusterError, match=words):
        network.connect([host], [1], "1ms" if option == "--delay" else None)


def test_a_host_is_found_by_its_name_and_by_its_address():
    text = "node1 10.77.0.1 31\nnode10 10.77.0.10 40\n"
    assert login.find(text, "node1") == login.find(text, "10.77.0.1") == 31
    assert login.find(text, "node10") == login.find(text, "10.77.0.10") == 40
    with pytest.raises(SystemExit, match=r"expected one of this cluster: node1 \(10\.77\.0\.1\), "):
        login.find(text, "10.77.0.2")


def test_the_script_becomes_it_in_the_environment(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    loader = machinery.SourceFileLoader("launch_cluster", str(ROOT / "launch" / "cluster"))
    script = util.module_from_spec(util.spec_from_loader("launch_cluster", loader))
    loader.exec_module(script)
    monkeypatch.setattr(script, "prepare", lambda **_: Path(sys.executable))
    monkeypatch.setattr(cluster, "_require_root_and_tools", lambda: None)
    monkeypatch.setattr(sys, "argv", ["launch/cluster", "--hosts", "2", "--", "train"])
    became = []
    monkeypatch.setattr(os, "execve", lambda *words: became.append(words))
    script.main()
    ((program, words, environment),) = became
    assert program == Path(sys.executable)
    assert words[2:] == ["--hosts", "2", "--", "train"]
    words = [*words[:2], "--help"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: launch/cluster --hosts N ")
    assert os.access(ROOT / "launch" / "cluster", os.X_OK)
