"""The blocks of README.md and of docs/ that need Horovod or a parameter server run."""

from __future__ import annotations

from pathlib import Path

import pytest
from docs_blocks import blocks_by_kind
from launching import horovod_job, server_job

pytestmark = [pytest.mark.parallel, pytest.mark.slow]


def test_blocks_with_pytorch(tmp_path: Path) -> None:
    environment = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"}
    results = horovod_job(3, "docs_torch.py", tmp_path, environment=environment)
    for result in results:
        assert result["recipes"] > 10
        assert len(result["losses"]) == 100  # and what the block asserts held


def test_blocks_with_keras(tmp_path: Path) -> None:
    for result in horovod_job(2, "docs_tensorflow.py", tmp_path):
        assert result == {"recipes": 10, "moved": [True, True]}


def test_blocks_with_a_parameter_server(tmp_path: Path) -> None:
    blocks = blocks_by_kind()
    saves = f"--checkpoint={tmp_path / 'server'}"
    # Kinds that share a start: "torch, resumed" reads what "torch" has saved.
    starts = [
        (2, saves, ["numpy"]),
        (1, saves, ["torch", "torch, resumed", "tensorflow"]),
        (2, "--quorum=1", ["numpy, quorum", "torch, quorum"]),
    ]
    assert blocks.keys() == {kind for _, _, kinds in starts for kind in kinds}
    for workers, option, kinds in starts:
        results = server_job(
            1, workers, "docs_server.py", tmp_path, *kinds, server=(option,), jobs=len(kinds)
        )
        assert results == [{kind: len(blocks[kind]) for kind in kinds}] * workers
