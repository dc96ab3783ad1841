"""Loss of a tiny GPT-2 of Hugging Face's under AdamW, dense and compressed, after few steps.

    pip install transformers
    horovodrun -np 2 python benchmarks/tiny_gpt2.py --steps 60 300

The model has 415 thousand random weights. Its text is made up: numbers that go up by 1, 2 or 3,
modulo 101, from a random start. Each way is run at each learning rate; the table has the best loss
(mean of the last five steps and of the ranks), and the bytes that a rank sent relative to dense.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import horovod.torch as hvd
import torch
from tabulate import tabulate
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import ef_horovod.torch as ef

WORDS, LENGTH, BATCH = 101, 32, 8


class Way(NamedTuple):
    """A method, what it compresses, and the part of all steps that is dense."""

    method: ef.Method
    what: str = "gradient"  # or "momentum" (FrozenAdam), or "update" (CompressedUpdates)
    dense_part: float = 0.0
    vectors: bool = False  # compress vectors too


FEW_SIGNS = ef.Then(ef.TopK(ratio=0.04), ef.OneBit())
WAYS = {
    "dense AdamW": Way(ef.NoFeedback(ef.Identity())),
    "AdamW's updates, 1 bit": Way(ef.ErrorFeedback(ef.OneBit()), "update"),
    "the same, vectors too": Way(ef.ErrorFeedback(ef.OneBit()), "update", vectors=True),
    "AdamW's updates, signs of 4 %": Way(ef.ErrorFeedback(FEW_SIGNS), "update"),
    "the same, vectors too ": Way(ef.ErrorFeedback(FEW_SIGNS), "update", vectors=True),
    "FrozenAdam, 1 bit": Way(ef.FrozenAdam(ef.OneBit()), "momentum", 0.2),
    "FrozenAdam, signs of 4 %": Way(ef.FrozenAdam(FEW_SIGNS), "momentum", 0.2),
    "error feedback, 1 bit, AdamW": Way(ef.ErrorFeedback(ef.OneBit())),
    "error feedback, top-k 1 %, AdamW": Way(ef.ErrorFeedback(ef.TopK(ratio=0.01))),
}


def build() -> torch.nn.Module:
    """Two layers of width 128, without dropout."""
    torch.manual_seed(0)
    without = {f"{part}_pdrop": 0.0 for part in ("resid", "embd", "attn")}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_layer=2, n_embd=128, n_head=4, n_positions=LENGTH, **without)
    )


def train(way: Way, lr: float, steps: int) -> tuple[float, float]:
    """The loss, and dense bytes for each byte sent."""
    model, dense_steps = build(), round(way.dense_part * steps)
    kind = torch.optim.SGD if way.what == "momentum" else torch.optim.AdamW
    inner = kind(model.parameters(), lr=lr)
    options: Any = {"dense": lambda name, p: False} if way.vectors else {}
    wrap: Any = ef.CompressedUpdates if way.what == "update" else ef.DistributedOptimizer
    optimizer = wrap(
        inner, model.named_parameters(), way.method, dense_steps=dense_steps, **options
    )
    draw = torch.Generator().manual_seed(hvd.rank())
    losses = []
    for _ in range(steps):
        starts = torch.randint(WORDS, (BATCH, 1), generator=draw)
        strides = torch.randint(1, 4, (BATCH, 1), generator=draw)
        words = (starts + strides * torch.arange(LENGTH)) % WORDS
        model.zero_grad()
        loss = model(input_ids=words, labels=words).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    total = optimizer.stats()[-1]
    if way.what != "update":
        optimizer.unwrap()
    loss = hvd.allreduce(torch.stack(losses[-5:]).mean())
    return float(loss), total.dense_bytes_out / total.bytes_out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[60, 300])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.001, 0.003, 0.006])
    arguments = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    rows = []
    cases = [(steps, name) for steps in arguments.steps for name in WAYS]
    for steps, name in tqdm(cases, disable=hvd.rank() != 0, unit="way"):
        found = {lr: train(WAYS[name], lr, steps) for lr in arguments.rates}
        lr = min(found, key=lambda rate: found[rate][0])
        loss, factor = found[lr]
        rows.append([steps, name, lr, f"{loss:.4f}", f"1/{factor:.0f}"])
    if hvd.rank() == 0:
        heads = ["steps", "way", "rate", "loss", "bytes"]
        print(tabulate(rows, heads, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
