"""Names of collectives are counted for each process set."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ef_horovod.transports import horovod


def test_a_rank_outside_of_a_set_counts_the_others_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    half = SimpleNamespace(process_set_id=3)

    def names(*process_sets: object) -> list[str]:
        monkeypatch.setattr(horovod, "_instances", {})
        return [horovod.next_prefix("ef", one) for one in process_sets]

    assert names(None, half, half, None) == ["ef0", "ef.set3.0", "ef.set3.1", "ef1"]
    assert names(None, None) == ["ef0", "ef1"]
