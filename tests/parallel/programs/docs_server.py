"""Runs the blocks of docs/server.md as a worker beside a parameter server, a job for each kind."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import ARGUMENTS, OUT, report
from docs_blocks import PAGE, blocks_by_kind
from meeting import meet

sys.path.insert(0, str(Path(__file__).parents[2]))

from pages import run_in_order

STEPS = 5


def with_numpy(blocks: list[str]) -> dict[str, Any]:
    w, b = np.zeros((40, 30)), np.zeros(30)
    names = {"np": np, "pickle": pickle, "w": w, "b": b, "model": w}
    names |= {"gradient_w": w + 1, "gradient_b": b + 1}
    first, *others = blocks
    worker = run_in_order([first], PAGE, lambda _: names)["worker"]
    while worker.step % 1000:
        worker.push_pull({"w": w, "b": b})
    return run_in_order(others, PAGE, lambda _: names | {"worker": worker}) | {"worker": worker}


def with_numpy_quorum(blocks: list[str]) -> dict[str, Any]:
    import ef_horovod as ef
    from ef_horovod.server import Worker

    w = np.zeros((40, 30))
    worker = Worker({"w": w}, ef.EF21(ef.TopK(ratio=0.1)))
    names = {"worker": worker, "w": w, "gradient_of": lambda w: w - 1, "rate": 0.1, "steps": STEPS}
    return run_in_order(blocks, PAGE, lambda _: names)


def with_torch(blocks: list[str]) -> dict[str, Any]:
    import torch

    import ef_horovod.torch as ef

    torch.manual_seed(0)
    model = torch.nn.Linear(64, 32)
    optimizer = ef.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model.named_parameters(),
        compression=ef.EF21(ef.TopK(ratio=0.1)),
        exchange="server",
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    inputs = torch.randn(16, 64)

    def loss_of(model: Any) -> Any:
        return (model(inputs) ** 2).mean()

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()

    names = {"torch": torch, "model": model, "optimizer": optimizer, "loss_of": loss_of}
    names |= {"scheduler": scheduler, "steps": STEPS}
    resumes = any(".load" in block for block in blocks)
    if not resumes and "rounds" not in blocks[0]:
        step()
    names = run_in_order(blocks, PAGE, lambda _: names)
    if resumes:
        step()
    return names


def with_tensorflow(blocks: list[str]) -> dict[str, Any]:
    import keras

    import ef_horovod.tensorflow as ef

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32)])
    optimizer = ef.DistributedOptimizer(
        keras.optimizers.SGD(0.1), compression=ef.EF21(ef.TopK(ratio=0.1)), exchange="server"
    )
    model.compile(optimizer, "mse", run_eagerly=True)
    names = run_in_order(blocks, PAGE, lambda _: {"keras": keras, "optimizer": optimizer})
    inputs, targets = np.ones((16, 64), "float32"), np.zeros((16, 32), "float32")
    model.fit(inputs, targets, verbose=0, callbacks=[names["Save"]()])
    return names


def run_kind(kind: str) -> tuple[int, int]:
    """This worker's rank, and how many blocks ran."""
    folder = OUT / kind.partition(",")[0]
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    blocks = blocks_by_kind()[kind]
    run = {"numpy": with_numpy, "numpy, quorum": with_numpy_quorum, "tensorflow": with_tensorflow}
    names = run.get(kind, with_torch)(blocks)
    waits = names["worker"] if kind.startswith("numpy") else names["optimizer"]
    waits.transport.close()
    return waits.transport.rank, len(blocks)


def main() -> None:
    meet()
    results = {}
    for kind in ARGUMENTS:
        rank, results[kind] = run_kind(kind)
    report(rank, results)


if __name__ == "__main__":
    main()
