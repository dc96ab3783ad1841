"""Steps under Adam: a small transformer on a text, trained by AdamW and by compressed ways.

    horovodrun -np 2 python benchmarks/language_model.py --text bible.txt.xz --out runs.jsonl
    python benchmarks/language_model.py --table runs.jsonl

Any plain text of some megabytes does (`.xz` too), for example the King James Bible of Project
Gutenberg. Each way is run at each learning rate with one seed, and then at its best rate with the
other seeds, and in a longer run. Runs that the file has already are left out, so an interrupted
command goes on where it was. Each rank has its own batches of 16 x 64 characters. Rates warm up for
100 steps and fall by a cosine to a tenth. Gradients are clipped at a norm of 1: after the averages
in dense training, in the method otherwise where it can.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import horovod.torch as hvd
import torch
from tabulate import tabulate
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from tqdm import tqdm

import ef_horovod.torch as ef

LENGTH, BATCH, WIDTH, LAYERS, HEADS = 64, 16, 96, 2, 4
WARM_UP, WEIGHT_DECAY = 100, 0.01


class Way(NamedTuple):
    """A method beside an optimizer."""

    method: Any
    plain_sgd: bool = False  # the method makes the updates
    dense_part: float = 0.0  # of all steps


FEW_SIGNS = ef.Then(ef.TopK(ratio=0.04), ef.OneBit())
WAYS = {
    "dense AdamW": Way(ef.NoFeedback(ef.Identity())),
    "FrozenAdam, 1 bit": Way(ef.FrozenAdam(ef.OneBit(), clip=1.0), True, 0.15),
    "FrozenAdam, signs of 4 %": Way(ef.FrozenAdam(FEW_SIGNS, clip=1.0), True, 0.15),
    "FrozenAdam, top-k 1 %": Way(ef.FrozenAdam(ef.TopK(ratio=0.01), clip=1.0), True, 0.15),
    "error feedback, 1 bit, AdamW": Way(ef.ErrorFeedback(ef.OneBit())),
    "error feedback, top-k 1 %, AdamW": Way(ef.ErrorFeedback(ef.TopK(ratio=0.01))),
    "the same, 15 % dense steps": Way(ef.ErrorFeedback(ef.TopK(ratio=0.01)), dense_part=0.15),
    "EF21, top-k 1 %, AdamW": Way(ef.EF21(ef.TopK(ratio=0.01))),
}


class Block(nn.Module):
    """A layer of the transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, w = x.shape
        heads = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, w // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = heads
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, w))
        return x + self.down(gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Logits of the next character: int64[b, t] to float32[b, t, characters]."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        embedded = self.embed(x) + self.place.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(embedded)))


class Text(NamedTuple):
    """A text as numbers; its last tenth is for validation."""

    train: torch.Tensor  # int64[m]
    validation: torch.Tensor
    characters: int

    @classmethod
    def read(cls, path: Path) -> Text:
        """The text of a file, `.xz` or plain."""
        data = path.read_bytes()
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode(errors="ignore")
        number = {c: i for i, c in enumerate(sorted(set(text)))}
        codes = torch.tensor([number[c] for c in text])
        split = len(codes) * 9 // 10
        return cls(codes[:split], codes[split:], len(number))

    def batch(self, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Random pieces, and the same one character later."""
        starts = torch.randint(len(self.train) - LENGTH - 1, (BATCH,), generator=draw)
        return _pairs(self.train, starts)

    def loss(self, model: nn.Module) -> float:
        """The validation loss, in nats per character, over 256 pieces."""
        starts = torch.arange(256) * ((len(self.validation) - LENGTH - 1) // 256)
        x, y = _pairs(self.validation, starts)
        with torch.no_grad():
            return float(cross_entropy(model(x).flatten(0, 1), y.flatten()))


def _pairs(codes: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.stack([codes[s : s + LENGTH + 1] for s in starts])
    return x[:, :-1], x[:, 1:]


def train(way: Way, text: Text, *, lr: float, steps: int, seed: int) -> dict[str, Any]:
    """One training; loss, bytes a rank sent relative to dense, and seconds."""
    torch.manual_seed(seed)
    model = Transformer(text.characters)
    kind = torch.optim.SGD if way.plain_sgd else torch.optim.AdamW
    inner = kind(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    dense_steps = round(way.dense_part * steps)
    optimizer = ef.DistributedOptimizer(
        inner, model.named_parameters(), compression=way.method, dense_steps=dense_steps
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: _rate(t, steps))
    draw = torch.Generator().manual_seed(1000 * seed + hvd.rank())
    begin, before = time.perf_counter(), (0, 0)
    for step in range(steps):
        if step == dense_steps:
            before = _bytes(optimizer)
        x, y = text.batch(draw)
        optimizer.zero_grad()
        cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        if way.plain_sgd:
            optimizer.step()
        else:
            optimizer.synchronize()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with optimizer.skip_synchronize():
                optimizer.step()
        schedule.step()
    sent, dense = _bytes(optimizer)
    return {
        "loss": text.loss(model),
        "bytes": sent / dense,
        "bytes after dense steps": (sent - before[0]) / (dense - before[1]),
        "seconds": time.perf_counter() - begin,
    }


def _rate(step: int, steps: int) -> float:
    done = max(0, step - WARM_UP) / max(1, steps - WARM_UP)
    return min(1, (step + 1) / WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * done))


def _bytes(optimizer: Any) -> tuple[int, int]:
    total = optimizer.stats()[-1]
    return total.bytes_out, total.dense_bytes_out


def plan(
    arguments: argparse.Namespace, best: Callable[[str], float]
) -> Iterator[tuple[str, float, int, int]]:
    """Way, rate, steps and seed of all runs; `best` rate of a way, of the runs so far."""
    for name in WAYS:
        yield from ((name, lr, arguments.steps, 0) for lr in arguments.rates)
    for name in WAYS:
        yield from ((name, best(name), arguments.steps, s) for s in range(1, arguments.seeds))
        if arguments.long_steps:
            yield name, best(name), arguments.long_steps, 0


def read(path: Path) -> dict[tuple[str, float, int, int], dict[str, Any]]:
    """Runs by way, rate, steps and seed."""
    lines = path.read_text().splitlines() if path.exists() else []
    runs = [json.loads(line) for line in lines if line.endswith("}")]
    return {(r["way"], r["lr"], r["steps"], r["seed"]): r for r in runs}


def run_all(arguments: argparse.Namespace) -> None:
    """All runs that the file does not have yet; on all ranks."""
    hvd.init()
    torch.set_num_threads(1)
    text, done = Text.read(arguments.text), read(arguments.out)

    def best(name: str) -> float:
        return min(arguments.rates, key=lambda lr: done[name, lr, arguments.steps, 0]["loss"])

    runs = tqdm(plan(arguments, best), disable=hvd.rank() != 0, unit="run")
    for name, lr, steps, seed in runs:
        runs.set_description(name)
        if (name, lr, steps, seed) in done:
            continue
        facts = hvd.broadcast_object(train(WAYS[name], text, lr=lr, steps=steps, seed=seed))
        run = {"way": name, "lr": lr, "steps": steps, "seed": seed, "ranks": hvd.size(), **facts}
        done[name, lr, steps, seed] = run
        if hvd.rank() == 0:
            with arguments.out.open("a") as file:
                file.write(json.dumps(run) + "\n")


def table(path: Path) -> str:
    """Loss of each way at its best rate, by number of steps; mean and range over seeds."""
    runs = list(read(path).values())
    rows = []
    for steps in sorted({run["steps"] for run in runs}):
        for name in WAYS:
            mine = [run for run in runs if (run["way"], run["steps"]) == (name, steps)]
            first = [run for run in mine if run["seed"] == 0]
            if not first:
                continue
            lr = min(first, key=lambda run: run["loss"])["lr"]
            losses = [run["loss"] for run in mine if run["lr"] == lr]
            sent = first[0]["bytes"], first[0]["bytes after dense steps"]
            shares = [f"1/{1 / part:.0f}" for part in sent]
            spread = f"{min(losses):.3f} to {max(losses):.3f}" if len(losses) > 1 else ""
            rows.append([steps, name, lr, f"{statistics.mean(losses):.3f}", spread, *shares])
    heads = ["steps", "way", "rate", "loss", "seeds", "bytes", "after dense steps"]
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="file to train on")
    parser.add_argument("--out", type=Path, default=Path("language_model.jsonl"))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.006, 0.012])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--long-steps", type=int, default=1600, help="0: no longer runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", type=Path, metavar="RUNS", help="only print this file's table")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.table))
    elif not arguments.text:
        parser.error("got no --text, expected a text file to train on")
    else:
        run_all(arguments)
        if hvd.rank() == 0:
            print(table(arguments.out))


if __name__ == "__main__":
    main()
