"""Hugging Face's models: Identity is plain Horovod, and ranks stay equal under top-k."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from launching import Results, horovod_job

PROGRAMS = Path(__file__).parent / "programs"
SHARED = Path(__file__).parents[1] / "parallel" / "programs"
RECIPES = [
    "gpt2, clipping",
    "bert, clipping",
    "gpt2, accumulation",
    "bert, accumulation",
    "gpt2, autocast",
    "bert, autocast",
    "gpt2, checkpointing",
    "gpt2, torch.compile",
    "gpt2, LoRA",
    "gpt2, bfloat16",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    paths = os.pathsep.join(filter(None, [str(SHARED), os.environ.get("PYTHONPATH")]))
    environment = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    program, out = str(PROGRAMS / "hugging_face.py"), tmp_path_factory.mktemp("models")
    return horovod_job(2, program, out, environment=environment, timeout=600)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "bfloat16" not in name])
def test_identity_is_plain_horovod(recipe: str, results: Results) -> None:
    for result in results:
        assert result[recipe]["difference"] <= 1e-6


@pytest.mark.parametrize("recipe", RECIPES)
def test_ranks_stay_equal(recipe: str, results: Results) -> None:
    first, second = (result[recipe]["ends"] for result in results)
    assert first == second
    assert len(set(first.values())) == 3, "nothing was trained, or nothing was compressed"
    for result in results:
        assert all(math.isfinite(loss) for loss in result[recipe]["losses"])
