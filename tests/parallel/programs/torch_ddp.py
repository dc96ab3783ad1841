"""`ef.ddp_hook` beside the wrapped optimizer and beside dense DDP; by torchrun, without Horovod."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import without_horovod  # noqa: F401
from common import error_of, report
from torch.nn.parallel import DistributedDataParallel as DDP
from torch_common import batches, build_model, digest, flat

import ef_horovod.torch as ef

sys.path.insert(0, str(Path(__file__).parents[2]))
from pages import python_blocks, run_in_order

TOPK = ef.EF21(ef.TopK(0.1))
ALL = {"dense": lambda name, parameter: False}


def steps(model, next_batch, count, *, passes=1, poison=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(count):
        optimizer.zero_grad()
        for i in range(passes):
            inputs, labels = next_batch()
            waits = model.no_sync() if i < passes - 1 else contextlib.nullcontext()
            with waits:
                out = model(inputs.to(next(model.parameters()).dtype)).float()
                loss = torch.nn.functional.cross_entropy(out, labels)
                (loss * (float("nan") if step == poison else 1.0)).backward()
        if all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters()):
            optimizer.step()
    return model


def hooked(method=TOPK, model=None, options=None, **of_ddp):
    model = DDP(model or build_model(), **of_ddp)
    state, hook = ef.ddp_hook(method, model, **(options or {}))
    model.register_comm_hook(state, hook)
    return model, state


class Forks(torch.nn.Module):
    """Uses one of its layers on each rank."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(40, 40) for _ in range(3)])

    def forward(self, x):
        return self.layers[2](self.layers[dist.get_rank() % 2](x))


def by_optimizer(count):
    model = build_model()
    optimizer = ef.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05), model.named_parameters(), TOPK,
        transport="torch",
    )  # fmt: skip
    next_batch = batches(dist.get_rank())
    for _ in range(count):
        optimizer.zero_grad()
        inputs, labels = next_batch()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return digest(model)


def main():
    rank = int(os.environ["RANK"])
    result = {"blocks": follow_the_page(rank)}  # whose first block makes the process group
    result["optimizer"] = by_optimizer(5)

    model, state = hooked()
    steps(model, batches(rank), 5)
    result["hook"] = digest(model)
    result["sent"] = state.transport.bytes_sent
    result["steps"] = state.steps_taken()

    small = {"bucket_cap_mb": 0.008}  # several buckets, which DDP makes anew after a step
    model, state = hooked(**small)
    steps(model, batches(rank), 3)
    result["kept"] = {
        name: sum(float(torch.as_tensor(value).float().norm()) for value in fields.values())
        for name, fields in state.state_dict()["parameters"].items()
    }
    result["rebuilt"] = len(state._earlier)

    next_batch = batches(rank)
    whole, _ = hooked()
    steps(whole, batches(rank), 6)
    first, state = hooked()
    steps(first, next_batch, 3)
    second, again = hooked(model=first.module)
    again.load_state_dict(state.state_dict())
    steps(second, next_batch, 3)
    result["checkpoint"] = float((flat(second) - flat(whole)).abs().max())

    model, state = hooked(**small)
    next_batch = batches(rank)
    steps(model, next_batch, 3)
    before, saved = digest(model), state.state_dict()["parameters"]
    steps(model, next_batch, 1, poison=0 if rank == 1 else None)
    now = state.state_dict()["parameters"]
    result["nan"] = all(bool(torch.isnan(p.grad).all()) for p in model.parameters())
    result["nan_kept"] = digest(model) == before and all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(now[name][field]))
        for name, fields in saved.items()
        for field, v in fields.items()
    )

    exact = ef.ErrorFeedback(ef.TopK(1.0))
    for name, of_ddp in {
        "dense": {}, "static": {"static_graph": True}, "views": {"gradient_as_bucket_view": True},
    }.items():  # fmt: skip
        passes = 1 if name == "static" else 2  # torch has no no_sync in its first pass
        plain = steps(DDP(build_model(), **of_ddp), batches(rank), 4, passes=passes)
        ours, _ = hooked(exact, options=ALL, **of_ddp)
        steps(ours, batches(rank), 4, passes=passes)
        result[name] = float((flat(plain) - flat(ours)).abs().max())
    forks, _ = hooked(TOPK, model=Forks(), find_unused_parameters=True)
    steps(forks, batches(rank), 4)
    result["unused"] = digest(forks)
    half, _ = hooked(model=build_model().bfloat16())
    steps(half, batches(rank), 3)
    result["bfloat16"] = digest(half)
    plain = torch.nn.Linear(2, 2)
    result["not_ddp"] = error_of(lambda: ef.ddp_hook(TOPK, plain))
    momentum = ef.MomentumCorrection(ef.TopK(0.1))
    result["momentum"] = error_of(lambda: ef.ddp_hook(momentum, DDP(plain)))
    rows = torch.nn.Sequential(torch.nn.Embedding(10, 4, sparse=True), plain)
    result["sparse"] = error_of(lambda: ef.ddp_hook(TOPK, DDP(rows)))
    report(rank, result)


def follow_the_page(rank):
    """Run the blocks of the documentation, and a step with what each one makes."""
    done = 0
    model = build_model()
    names = {
        "ef": ef, "torch": torch, "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05),
    }  # fmt: skip
    for block in python_blocks("docs/torch-distributed.md"):
        names = run_in_order([block], "docs/torch-distributed.md", lambda _, names=names: names)
        inputs, labels = batches(rank)()
        torch.nn.functional.cross_entropy(names["model"](inputs), labels).backward()
        names["optimizer"].step()
        if not done:
            names["optimizer"].unwrap()  # DDP sends the gradients of the second block
        done += 1
    return [done, digest(names["model"])]


main()
