"""Without compression, both adapters are plain Horovod to float32 rounding."""

from __future__ import annotations

import numpy as np
import pytest
from launching import Results, horovod_job

pytestmark = pytest.mark.parallel


@pytest.fixture(
    scope="module",
    params=[(3, "mpi"), (2, "gloo"), pytest.param((2, "mpi"), marks=pytest.mark.exhaustive)],
    ids=lambda case: f"{case[0]}-{case[1]}",
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    ranks, library = request.param
    out = tmp_path_factory.mktemp("identity")
    return horovod_job(ranks, "identity.py", out, gloo=library == "gloo")


def test_identity_is_plain_horovod(results: Results) -> None:
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


def test_both_adapters_run_one_algorithm(results: Results) -> None:
    """With equal buckets, both compress the same vectors under the same rules."""
    for result in results:
        one, small = (
            [result[f"{b}, {a}"] for a in ("ef", "stock")] for b in ("one bucket", "small buckets")
        )
        np.testing.assert_array_equal(*one)
        np.testing.assert_array_equal(*small)
        assert one[0] != small[0]
