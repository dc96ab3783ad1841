"""These tests need a GPU that PyTorch can use; a plain pytest does not collect them.

`launch/test --gpu` runs them. What they share with tests of the CPU is imported from there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / part) for part in ("unit", "parallel", "parallel/programs")]

collect_ignore_glob = [] if os.environ.get("EF_TEST_GPU") else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _gpu() -> None:
    """Fail, and do not skip, where there is none."""
    import torch

    assert torch.cuda.is_available(), (
        f"torch {torch.__version__} sees no GPU, these tests need one; install a build of torch "
        "with CUDA and a driver, or leave out --gpu"
    )
