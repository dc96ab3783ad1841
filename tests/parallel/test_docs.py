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
    # Workers by kind, in this order: "torch, resumed" reads what "torch" has saved.
    kinds = {"numpy": 2, "torch": 1, "torch, resumed": 1, "tensorflow": 1}
    kinds |= {"numpy, quorum": 2, "torch, quorum": 2}
    assert blocks.keys() == kinds.keys()
    for kind, workers in kinds.items():
        folder = tmp_path / kind.partition(",")[0]
        folder.mkdir(exist_ok=True)
        options = ("--quorum=1",) if "quorum" in kind else (f"--checkpoint={folder / 'server'}",)
        words = (kind, str(folder))
        results = server_job(1, workers, "docs_server.py", tmp_path, *words, server=options)
        assert [result["blocks"] for result in results] == [len(blocks[kind])] * workers
