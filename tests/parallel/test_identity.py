"""Without compression, both adapters are plain Horovod to float32 rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from launching import horovod_job

pytestmark = pytest.mark.parallel


@pytest.mark.parametrize(("ranks", "gloo"), [(2, False), (3, False), (2, True)])
def test_identity_is_plain_horovod(ranks: int, gloo: bool, tmp_path: Path) -> None:
    results = horovod_job(ranks, "identity.py", tmp_path, gloo=gloo)
    for rank, of_rank in enumerate(results):
        for step, facts in enumerate(of_rank["where they lie"]):
            assert facts["right"], f"rank {rank}, step {step}"
            alone = rank == 0 and step == 1  # which had no gradient to sum in
            assert facts["in place"] != alone, f"rank {rank}, step {step}"
    result = results[0]
    for name in ("ef dense", "ef reduce", "ef gather", "ef late", "stock dense", "stock reduce"):
        np.testing.assert_allclose(
            result["horovod"], result[name], rtol=2e-4, atol=2e-6, err_msg=name
        )
    np.testing.assert_allclose(result["horovod sum"], result["ef sum"], rtol=2e-4, atol=2e-6)
    distance = np.linalg.norm(np.subtract(result["horovod"], result["horovod sum"]))
    assert distance > 0.1, "Sum and Average ended in the same place: the check above shows nothing"


def test_both_adapters_run_one_algorithm(tmp_path: Path) -> None:
    """With equal buckets, both compress the same vectors under the same rules."""
    result = horovod_job(2, "identity.py", tmp_path)[0]
    one, small = (
        [result[f"{b}, {a}"] for a in ("ef", "stock")] for b in ("one bucket", "small buckets")
    )
    np.testing.assert_array_equal(*one)
    np.testing.assert_array_equal(*small)
    assert one[0] != small[0]
