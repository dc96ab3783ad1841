"""Jobs on several nodes over ssh, nobody disturbing them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from nodes import NAMES, PYTHON, Nodes

pytestmark = pytest.mark.docker

EXAMPLES = "/opt/ef_horovod/examples"
HOSTS = ",".join(f"{name}:1" for name in NAMES)


def test_nodes_know_each_other_and_share_variables(nodes: Nodes) -> None:
    for one in NAMES:
        for other in NAMES:
            said = nodes.on(one, "ssh", other, "hostname; command -v orted; echo $OPAL_PREFIX")
            assert said.split() == [other, "/opt/venv/bin/orted", "/opt/venv"]


def test_a_stranger_cannot_log_in(nodes: Nodes) -> None:
    other_key = "ssh-keygen -q -t ed25519 -N '' -f /tmp/other <<< y > /dev/null; "
    login = "ssh -v -o IdentityFile=/tmp/other -o IdentitiesOnly=yes node2 true 2>&1; echo $?"
    nodes.on("node1", "rm", "-f", "/tmp/other")
    said = nodes.on("node1", "bash", "-c", other_key + login)
    assert "Permission denied (publickey" in said
    assert said.endswith("255\n")


@pytest.mark.parametrize("how", ["--mpi", "--gloo"])
def test_horovodrun_trains_an_example_on_four_nodes(how, nodes: Nodes, tmp_path: Path) -> None:
    job = ["horovodrun", how, "-np", "4", "-H", HOSTS, PYTHON, "equal_after.py"]
    printed = nodes.run([*job, f"{EXAMPLES}/torch_minimal.py"], tmp_path / "log", 300)
    accuracy, sent, dense = re.findall(r"accuracy ([\d.]+), sent (\d+) .*dense (\d+)", printed)[0]
    assert float(accuracy) > 0.8
    assert int(sent) < 0.15 * int(dense)
    assert "parameters equal on 4 ranks" in printed


def test_horovodrun_puts_two_ranks_on_a_node(nodes: Nodes, tmp_path: Path) -> None:
    job = ["horovodrun", "-np", "4", "-H", "node2:2,node4:2", PYTHON, "equal_after.py"]
    printed = nodes.run([*job, f"{EXAMPLES}/torch_minimal.py"], tmp_path / "log", 300)
    assert "parameters equal on 4 ranks" in printed


def test_keras_trains_on_two_nodes(nodes: Nodes, tmp_path: Path) -> None:
    job = ["horovodrun", "-np", "2", "-H", "node1:1,node3:1", PYTHON]
    printed = nodes.run([*job, f"{EXAMPLES}/tensorflow_keras_fit.py"], tmp_path / "log", 300)
    assert float(re.findall(r"accuracy ([\d.]+)", printed)[-1]) > 0.85


@pytest.mark.parametrize("example", ["server_numpy.py", "server_torch.py"])
def test_a_server_and_workers_of_a_hostfile(example, nodes: Nodes, tmp_path: Path) -> None:
    lines = "\\n".join(f"{name} slots=1" for name in NAMES)
    nodes.on("node1", "sh", "-c", f"printf '{lines}\\n' > /tmp/hosts")
    job = ["/opt/ef_horovod/launch/server", "-s", "1", "-w", "3", "--hostfile", "/tmp/hosts"]
    printed = nodes.run([*job, "--", PYTHON, f"{EXAMPLES}/{example}"], tmp_path / "log", 300)
    if example == "server_numpy.py":
        assert float(re.findall(r"distance to the solution ([\d.]+)", printed)[-1]) < 0.01
    else:
        assert float(re.findall(r"accuracy ([\d.]+)", printed)[-1]) > 0.9


def test_workers_of_a_server_stay_equal(nodes: Nodes, tmp_path: Path) -> None:
    job = ["/opt/ef_horovod/launch/server", "-s", "2", "-w", "4"]
    job += ["-H", "node1:2,node2:1,node3:1,node4:2", "--", PYTHON, "train_server.py", "50", "0"]
    printed = nodes.run(job, tmp_path / "log", 120)
    assert "parameters equal on 4 ranks" in printed
