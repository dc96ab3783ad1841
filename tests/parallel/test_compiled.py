"""Compiled steps and compiled backward passes train as those that are not compiled."""

from __future__ import annotations

import pytest
from launching import Results, horovod_job

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def results(every_case: bool, tmp_path_factory: pytest.TempPathFactory) -> Results:
    which = "all" if every_case else "some"
    return horovod_job(2, "compiled.py", tmp_path_factory.mktemp("compiled"), which)


@pytest.mark.parametrize("way", ["step", "autograd"])
def test_compilation_changes_no_number(way: str, results: Results) -> None:
    for result in results:
        assert len(result[way]) >= 2
        assert result[way].items() <= results[0]["eager"].items()


@pytest.mark.parametrize(
    "way",
    ["eager", *(pytest.param(way, marks=pytest.mark.exhaustive) for way in ("step", "autograd"))],
)
def test_without_compression_it_is_plain_horovod(way: str, results: Results) -> None:
    ends = results[0][way]
    assert ends["ours"] == ends["stock"] == ends["plain"]
