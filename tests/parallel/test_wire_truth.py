"""The library's byte count against the operating system's: what is claimed is what is sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import Results, mpirun, server_job
from processes import own_network

pytestmark = [pytest.mark.alone, pytest.mark.parallel]

# horovodrun sets `-mca btl` itself and takes no other; mpirun is Horovod's other launcher.
OVER_TCP = {
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "tcp,self",
    "OMPI_MCA_btl_tcp_if_include": "lo",
    "OMPI_MCA_oob_tcp_if_include": "lo",
}


PROGRAMS = {"torch": "wire_truth.py", "tensorflow": "tf_wire_truth.py"}
METHODS = ("dense", "topk", "onebit", "randomk", "both ways")


@pytest.fixture(scope="module", params=PROGRAMS)
def counts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Counts by method, of each rank; one method after the other on the same ranks."""
    out = tmp_path_factory.mktemp(request.param)
    return mpirun(
        2, PROGRAMS[request.param], out, *METHODS, before=own_network(), environment=OVER_TCP
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_kernel_counts_the_same_bytes(method: str, counts: Results) -> None:
    results = [of_rank[method] for of_rank in counts]
    library = sum(result["library"] for result in results)
    # Both ranks share the device; Horovod's control traffic flows in every cycle, used or not.
    kernel, control = results[0]["kernel"], results[0]["control"]
    print(
        f"{method}: library {library:,} B, kernel {kernel:,.0f} B, of these control {control:,.0f}"
    )
    assert kernel - control == pytest.approx(library, rel=0.05)
    assert control < 0.25 * kernel, "control traffic hides what is measured"
    dense = 4 * results[0]["elements"] * results[0]["steps"] * len(results)
    share = {
        "dense": 1.0,
        "topk": 0.08,
        "onebit": 1 / 31.9,
        "both ways": 1 / 31.9,
        "randomk": 0.0501,
    }[method]
    assert library <= share * dense


SHARES = {"dense": 1.0, "onebit": 1 / 31.9, "topk": 0.08}  # of a float32 gradient, each way


@pytest.fixture(scope="module")
def server_counts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool, Results]:
    """A folder with the server's logs, whether the device was the job's own, and the counts."""
    out, alone = tmp_path_factory.mktemp("server"), own_network()
    results = server_job(
        1,
        2,
        "server_wire_truth.py",
        out,
        *SHARES,
        server=(f"--log={out / 'log{}'}",),
        jobs=len(SHARES),
        before=alone,
        environment=OVER_TCP,
    )
    return out, bool(alone), results


@pytest.mark.parametrize("method", SHARES)
def test_the_kernel_counts_the_bytes_of_a_server(
    method: str, server_counts: tuple[Path, bool, Results]
) -> None:
    """Up and down together: the workers' own counts, the server's, and the device's."""
    out, alone, of_ranks = server_counts
    results = [of_rank[method] for of_rank in of_ranks]
    library = sum(result["library"] for result in results)
    kernel, control = results[0]["kernel"], results[0]["control"]
    print(f"{method}: library {library:,} B, kernel {kernel:,} B, of these idle {control:,.0f}")
    assert kernel - control == pytest.approx(library, rel=0.01 if alone else 0.05)
    assert control < (0.001 if alone else 0.25) * kernel, "an idle job sends nothing"
    steps, elements = results[0]["steps"], results[0]["elements"]
    messages = 2 * len(results) * steps
    headers = messages * (40 + 16)  # of the messages, and of the payloads in them
    assert library <= messages * SHARES[method] * 4 * elements + headers
    by_server, last = 0.0, 0
    log = out / f"log{list(SHARES).index(method)}"
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        by_server += (entry["bytes_up"] + entry["bytes_down"]) * (entry["round"] - last)
        last = entry["round"]
    # The server counts its welcome and the workers' farewells as well: headers alone.
    assert 0 <= by_server - library * last / steps <= 4 * 40
