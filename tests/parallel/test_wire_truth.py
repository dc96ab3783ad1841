"""The library's byte count against the operating system's: what is claimed is what is sent."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import mpirun

pytestmark = pytest.mark.parallel

# horovodrun sets `-mca btl` itself and takes no other; mpirun is Horovod's other launcher.
OVER_TCP = {
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "tcp,self",
    "OMPI_MCA_btl_tcp_if_include": "lo",
}


PROGRAMS = {"torch": "wire_truth.py", "tensorflow": "tf_wire_truth.py"}


@pytest.mark.parametrize("method", ["dense", "topk", "onebit", "randomk", "both ways"])
@pytest.mark.parametrize("framework", PROGRAMS)
def test_the_kernel_counts_the_same_bytes(framework: str, method: str, tmp_path: Path) -> None:
    results = mpirun(2, PROGRAMS[framework], tmp_path, method, environment=OVER_TCP)
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
