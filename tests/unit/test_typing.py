"""What a user's type checker sees: names that are there, and types that say something."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ef_horovod

PACKAGE = Path(ef_horovod.__file__).parent

GOOD = """
import numpy as np
import torch
from typing_extensions import assert_type

import ef_horovod as ef
import ef_horovod.tensorflow as etf
import ef_horovod.torch as et
from ef_horovod.exchange.stats import ChannelStats

payload = ef.TopK(k=1).compress(torch.zeros(3))
assert_type(payload.decompress(), torch.Tensor)
residual: torch.Tensor = ef.TopK(k=1).compress_with_residual(torch.zeros(3))[1]
sent: np.ndarray = ef.Payload.from_bytes(bytes(payload)).decompress()
model = torch.nn.Linear(2, 2)
optimizer = et.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1),
    model.named_parameters(),
    compression=et.EF21(et.TopK(ratio=0.01)),
)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
optimizer.synchronize()
with optimizer.skip_synchronize():
    optimizer.step()
optimizer.discard()
optimizer.zero_grad()
assert_type(optimizer.stats(), list[ChannelStats])
assert_type(optimizer.step_skipped, bool)
updating = et.CompressedUpdates(
    torch.optim.SGD(model.parameters(), lr=0.1),
    named_parameters=model.named_parameters(),
    compression=et.ErrorFeedback(et.OneBit()),
    backward_passes_per_step=2,
)
scheduler = torch.optim.lr_scheduler.StepLR(updating, 3)
updating.step()
assert_type(updating.stats(), list[ChannelStats])
assert_type(updating.step_skipped, bool)
etf.EF21(etf.OneBit())
"""
BAD = """
import ef_horovod as ef
import ef_horovod.tensorflow as etf
import ef_horovod.torch as et

ef.NoSuch
et.NoSuch
etf.NoSuch
et.DistributedOptimizer(None)
ef.TopK(k=1).compress([1.0]).decompress().no_such
ef.Payload.from_bytes(b"").decompress().no_such
"""


def test_names_that_are_not_there_are_errors_and_types_say_something(tmp_path):
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(BAD)
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--ignore-missing-imports", "good.py", "bad.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    lines = found.stdout.splitlines()
    assert not [line for line in lines if line.startswith(("good.py", "ef_horovod"))], found.stdout
    wrong = {int(line.split(":")[1]) for line in lines if line.startswith("bad.py")}
    assert wrong == set(range(6, 12)), found.stdout + found.stderr


@pytest.mark.parametrize("name", ["ef_horovod", "ef_horovod.torch", "ef_horovod.tensorflow"])
def test_type_checkers_are_told_all_names_and_no_others(name):
    module = importlib.import_module(name)
    stub = Path(module.__file__).with_suffix(".pyi")
    told = set()
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            told |= {alias.asname or alias.name for alias in node.names}
    if "*" in told:
        told = told - {"*"} | set(ef_horovod.__all__)
    own = {n for n in module.__all__ if not _is_registered_elsewhere(n)}
    assert told == own


def _is_registered_elsewhere(name: str) -> bool:
    kind = getattr(ef_horovod, name, None)
    return isinstance(kind, type) and not kind.__module__.startswith("ef_horovod.")
