"""Runs the blocks of the pages that train with PyTorch under Horovod, on three ranks."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from common import OUT, report

sys.path.insert(0, str(Path(__file__).parents[2]))

from pages import python_blocks, run_in_order

import ef_horovod.torch as ef

METHOD = ef.EF21(ef.TopK(ratio=0.1))


class Words(torch.nn.Module):
    """A small model with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 32)
        self.out = torch.nn.Linear(32, 50)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.out(self.embedding(words))


def given(block: str) -> dict[str, Any]:
    """What a recipe takes as defined; its optimizer is wrapped unless it begins with that."""
    torch.manual_seed(0)
    model, discriminator = Words(), torch.nn.Linear(50, 1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before, *wraps = re.split("DistributedOptimizer|CompressedUpdates", block, maxsplit=1)
    if not wraps or "optimizer." in before:
        optimizer = ef.DistributedOptimizer(optimizer, model.named_parameters(), compression=METHOD)

    def loss_of(words: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(words).flatten(0, -2), words.flatten())

    norms = iter([1.0, 100.0, 1.0])
    batches = torch.randint(50, (3, 4, 8), generator=torch.Generator().manual_seed(hvd.rank()))
    return {
        "ef": ef, "hvd": hvd, "torch": torch, "method": METHOD,
        "model": model, "optimizer": optimizer,
        "batches": batches, "loss_of": loss_of, "loss": loss_of(batches[0]),
        "scaler": torch.amp.GradScaler("cpu"),
        "norm_of": lambda _: next(norms), "limit": 10.0,
        "saved": {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        "discriminator": discriminator, "generator_optimizer": optimizer,
        "generator_loss": discriminator(model(batches[0])).mean(),
    }  # fmt: skip


def main() -> None:
    hvd.init()
    os.chdir(OUT)
    (stock,) = python_blocks("README.md")
    recipes = [stock, *python_blocks("docs/training.md", end="## TensorFlow and Keras")]
    run_in_order(recipes, "README.md and docs/training.md", given)
    alone = [block for block in python_blocks("docs/methods.md") if "horovod.torch" in block]
    losses = run_in_order(alone, "docs/methods.md")["losses"]
    report(hvd.rank(), {"recipes": len(recipes), "losses": losses})
    hvd.barrier()  # a rank that ends early shuts Horovod down for all


main()
