"""What `exchange="auto"` decides runs in the adapters, alike on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launching import horovod_job

pytestmark = [pytest.mark.parallel]

RANKS = 3
KINDS = {"auto": "gather", "auto:64kbit": "double_pass", "auto:400gbit,0us": "dense"}


def require_same(auto: dict[str, Any], named: dict[str, Any], kind: str) -> None:
    """The same numbers; up to the order of additions where Horovod sums what it fused."""
    assert auto["ways"] == named["ways"] == [kind]
    assert auto["norm"] == pytest.approx(named["norm"], rel=1e-5)
    assert kind == "dense" or auto["digest"] == named["digest"], kind


def test_torch_takes_what_the_network_asks_for(tmp_path: Path) -> None:
    results = horovod_job(RANKS, "auto_network.py", tmp_path)
    for rank, result in enumerate(results):
        assert len(result["found"]) == 6
        for way, runs in result["found"].items():
            _, exchange = way.split(" ")
            require_same(runs["auto"], runs["named"], KINDS[exchange])
            assert runs == results[0]["found"][way], f"rank {rank} differs by {way}"
        assert bool(result["warned"]) == (rank == 0)
        assert result["disagreement"].startswith("ConfigMismatchError: ")
        assert "gbit" in result["disagreement"]


def test_tensorflow_takes_what_the_network_asks_for(tmp_path: Path) -> None:
    results = horovod_job(RANKS, "tf_auto_network.py", tmp_path)
    for result in results:
        for exchange, runs in result.items():
            require_same(runs["auto"], runs["named"], KINDS[exchange])
        assert result == results[0]
