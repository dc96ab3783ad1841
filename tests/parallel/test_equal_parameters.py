"""After 200 steps all ranks hold the same parameters, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import horovodrun

from ef_horovod import registry

pytestmark = [pytest.mark.parallel, pytest.mark.slow]


def every_method() -> set[str]:
    return {
        repr(method)
        for cls in registry.COMPRESSORS.values()
        for compressor in cls.examples()
        for kind in registry.METHODS.values()
        for method in kind.examples(compressor)
    }


@pytest.mark.parametrize("adapter", ["ef", "stock"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_method_and_compressor(adapter: str, ranks: int, tmp_path: Path) -> None:
    fast_cycle = {"HOROVOD_CYCLE_TIME": "0.2"}
    results = horovodrun(
        ranks, "train_all.py", tmp_path, adapter, timeout=900, environment=fast_cycle
    )
    assert set(results[0]) == every_method()
    for method, first in results[0].items():
        assert first["start"] != first["end"], f"{method} did not train"
        # At the start it is about log(10); without feedback a biased compressor may stay there.
        limit = 2.5 if method.startswith("NoFeedback") else 2.1
        assert first["loss"] < limit, f"{method} did not learn"
        for rank, other in enumerate(results):
            assert other[method]["end"] == first["end"], f"{method}: rank {rank} differs"
