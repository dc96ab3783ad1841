"""Ranks of a Horovod job whose models are on a GPU; they may share one."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from launching import horovod_job
from processes import BIN, run_job
from same_gradients import digest, exchanges_of
from test_equal_parameters import require_equal
from test_same_numbers import simulate

from ef_horovod.testing import pairs

FAST_CYCLE = {"HOROVOD_CYCLE_TIME": "0.2"}
ROOT = Path(__file__).parents[2]


def test_methods_end_in_the_numbers_of_the_simulation(tmp_path: Path) -> None:
    results = horovod_job(
        2, "same_numbers.py", tmp_path, "torch:cuda", "all", environment=FAST_CYCLE, timeout=400
    )
    ends = {
        f"{method} by {exchange}": digest(simulate(method, exchange))
        for method in pairs.every_method()
        for exchange in exchanges_of(method)
    }
    assert results[0] == results[1]
    assert results[0].keys() == ends.keys()
    different = [name for name, end in ends.items() if results[0][name] != end]
    # Sums, which a GPU takes in another order.
    assert [name for name in different if "OneBit" not in name and "PowerSGD" not in name] == []
    assert len(different) < len(ends) / 3


@pytest.mark.parametrize("adapter", ["ef", "stock"])
def test_ranks_stay_equal(adapter: str, tmp_path: Path) -> None:
    words = (adapter, "selection", "100", "cuda")
    results = horovod_job(2, "train_all.py", tmp_path, *words, environment=FAST_CYCLE, timeout=400)
    require_equal([result[adapter] for result in results], pairs.selection())


def test_an_example_with_mixed_precision() -> None:
    words = [BIN / "horovodrun", "-np", "2", sys.executable, ROOT / "examples/torch_amp_clip.py"]
    printed = run_job([str(word) for word in words], timeout=300)
    found = re.search(r"accuracy (\S+), sent (\d+) bytes, dense (\d+)", printed)
    assert found, printed
    assert float(found[1]) > 0.9
    assert int(found[2]) < int(found[3]) / 10
