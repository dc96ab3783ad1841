"""Steps under Adam: a small transformer on a text, trained by AdamW and by compressed ways.

    horovodrun -np 2 python benchmarks/language_model.py --text bible.txt.xz --out runs.jsonl
    python benchmarks/language_model.py --table runs.jsonl

Any plain text of some megabytes does (`.xz` too), for example the King James Bible of Project
Gutenberg. Each way is run at each learning rate with one seed, and then at its best rate with the
other seeds, and in a longer run. Runs that the file has already are left out, so an interrupted
command goes on where it was. Each rank has its own batches of 16 x 64 characters. Rates warm up for
100 steps and fall by a cosine to a tenth. Gradients are clipped at a norm of 1: their averages, or
each rank's own where updates or momenta are averaged.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import horovod.torch as hvd
import torch
from tabulate import tabulate
from text_model import Text, Transformer, loss
from torch import nn
from tqdm import tqdm

import ef_horovod.torch as ef

LENGTH, BATCH, WIDTH, LAYERS, HEADS = 64, 16, 96, 2, 4
WARM_UP, WEIGHT_DECAY = 100, 0.01


class Way(NamedTuple):
    """A method, what it compresses, and the inner optimizer."""

    method: Any
    what: str = "gradient"  # or "momentum" (FrozenAdam), or "update" (CompressedUpdates)
    dense_part: float = 0.0  # of all steps
    muon: bool = False  # for matrices; AdamW for the rest
    local_steps: int = 1  # of "update", per exchange


DENSE, SIGNS = ef.NoFeedback(ef.Identity()), ef.ErrorFeedback(ef.OneBit())
TOP = ef.ErrorFeedback(ef.TopK(ratio=0.01))
FEW_UPDATES = ef.ErrorFeedback(ef.Then(ef.TopK(ratio=0.04), ef.OneBit()))
FEW_SIGNS = ef.FrozenAdam(ef.Then(ef.TopK(ratio=0.04), ef.OneBit()), clip=1.0)
WAYS = {
    "dense AdamW": Way(DENSE),
    "FrozenAdam, 1 bit": Way(ef.FrozenAdam(ef.OneBit(), clip=1.0), "momentum", 0.15),
    "FrozenAdam, signs of 4 %": Way(FEW_SIGNS, "momentum", 0.15),
    "the same, 10 % dense steps": Way(FEW_SIGNS, "momentum", 0.1),
    "the same, 5 % dense steps": Way(FEW_SIGNS, "momentum", 0.05),
    "FrozenAdam, top-k 1 %": Way(ef.FrozenAdam(ef.TopK(ratio=0.01), clip=1.0), "momentum", 0.15),
    "AdamW's updates, 1 bit": Way(SIGNS, "update"),
    "AdamW, 10 local steps, dense": Way(DENSE, "update", local_steps=10),
    "AdamW, 10 local steps, 1 bit": Way(SIGNS, "update", local_steps=10),
    "AdamW, 10 local steps, signs of 4 %": Way(FEW_UPDATES, "update", local_steps=10),
    "AdamW, 30 local steps, dense": Way(DENSE, "update", local_steps=30),
    "AdamW, 30 local steps, signs of 4 %": Way(FEW_UPDATES, "update", local_steps=30),
    "error feedback, 1 bit, AdamW": Way(SIGNS),
    "error feedback, top-k 1 %, AdamW": Way(TOP),
    "top-k 1 %, 15 % dense steps, AdamW": Way(TOP, dense_part=0.15),
    "EF21, top-k 1 %, AdamW": Way(ef.EF21(ef.TopK(ratio=0.01))),
    "dense Muon": Way(DENSE, muon=True),
    "Muon's updates, 1 bit": Way(SIGNS, "update", muon=True),
}


def train(way: Way, text: Text, *, lr: float, steps: int, seed: int) -> dict[str, Any]:
    """One training; loss, bytes a rank sent relative to dense, and seconds."""
    torch.manual_seed(seed)
    model = Transformer(text.characters, width=WIDTH, layers=LAYERS, heads=HEADS, length=LENGTH)
    dense_steps = round(way.dense_part * steps)
    inner = optimizers(way, model, lr)
    wrapped = [wrap(way, one, model, dense_steps) for one in inner]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda t: _rate(t, steps)) for one in wrapped
    ]
    draw = torch.Generator().manual_seed(1000 * seed + hvd.rank())
    begin, before = time.perf_counter(), (0, 0)
    for step in range(steps):
        if step == dense_steps:
            before = _bytes(wrapped)
        x, y = text.batch(BATCH, draw)
        model.zero_grad()
        loss(model, x, y).backward()
        if way.what == "gradient":
            for one in wrapped:
                one.synchronize()
        if way.what != "momentum":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one in wrapped:
            with one.skip_synchronize() if way.what == "gradient" else nullcontext():
                one.step()
        for schedule in schedules:
            schedule.step()
    for one in wrapped if way.what == "update" else ():
        one.exchange()
    sent, dense = _bytes(wrapped)
    for one in wrapped:
        one.unwrap()
    with torch.no_grad():
        reached = float(loss(model, *text.validation_pieces(256)))
    return {
        "loss": reached,
        "bytes": sent / dense,
        "bytes after dense steps": (sent - before[0]) / (dense - before[1]),
        "seconds": time.perf_counter() - begin,
    }


def optimizers(way: Way, model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """What a single rank would train with; plain SGD where the method makes the updates."""
    if way.what == "momentum":
        return [torch.optim.SGD(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)]
    blocks = [p for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("blocks")]
    matrices = blocks if way.muon else []
    known = set(matrices)
    others = [p for p in model.parameters() if p not in known]
    adam = torch.optim.AdamW(others, lr=lr, weight_decay=WEIGHT_DECAY)
    if not matrices:
        return [adam]
    muon = torch.optim.Muon(
        matrices, lr=lr, momentum=0.9, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, adam]


def wrap(way: Way, optimizer: torch.optim.Optimizer, model: nn.Module, dense_steps: int) -> Any:
    """The optimizer on all ranks."""
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    named = [(name, p) for name, p in model.named_parameters() if p in owned]
    if way.what == "update":
        return ef.CompressedUpdates(optimizer, named, way.method, local_steps=way.local_steps)
    return ef.DistributedOptimizer(
        optimizer, named, compression=way.method, dense_steps=dense_steps
    )


def _rate(step: int, steps: int) -> float:
    done = max(0, step - WARM_UP) / max(1, steps - WARM_UP)
    return min(1, (step + 1) / WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * done))


def _bytes(optimizers: list[Any]) -> tuple[int, int]:
    totals = [one.stats()[-1] for one in optimizers]
    return sum(t.bytes_out for t in totals), sum(t.dense_bytes_out for t in totals)


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
    text, done = Text.read(arguments.text, LENGTH), read(arguments.out)

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
