"""Ranks that do not start alike, and Horovod's broadcasts that make them; facts for the tests."""

from __future__ import annotations

import copy

import horovod.torch as hvd
import torch
from common import error_of, report
from torch_common import batches, build_model, digest, train

import ef_horovod.torch as ef

METHOD = ef.EF21(ef.TopK(ratio=0.1))


def wrap(model, optimizer, adapter="ef", **options):
    if adapter == "ef":
        return ef.DistributedOptimizer(
            optimizer, model.named_parameters(), compression=METHOD, **options
        )
    adapted = ef.Compression(METHOD, model.named_parameters(), **options)
    return hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=adapted)


def attempt(model, optimizer, steps):
    return error_of(lambda: train(model, optimizer, batches(hvd.rank()), steps))


def forgotten_broadcast(adapter):
    """At once, and nothing has changed: a broadcast makes it good."""
    model = build_model(seed=hvd.rank())
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05), adapter)
    before = digest(model)
    error = attempt(model, optimizer, 1)
    kept = digest(model) == before
    if adapter == "ef":
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        optimizer.step()
    return {"error": error, "kept": kept, "end": digest(model) if adapter == "ef" else ""}


def frozen_backbone(adapter):
    """The heads are equal; what is frozen and not the optimizer's is not."""
    head, backbone = torch.nn.Linear(40, 10), build_model(seed=hvd.rank())
    head.load_state_dict({"weight": torch.ones(10, 40), "bias": torch.zeros(10)})
    backbone[3] = torch.nn.Linear(50, 40)
    backbone.requires_grad_(False)
    model = torch.nn.Sequential(backbone, head)
    optimizer = wrap(model, torch.optim.SGD(head.parameters(), lr=0.05), adapter)
    return attempt(model, optimizer, 1)


def other_learning_rate(adapter):
    """With a warm-up from 0: step 1 changes nothing, step 2 does."""
    model = build_model()
    plain = torch.optim.SGD(model.parameters(), lr=0.01 * (1 + hvd.rank()))
    scheduler = torch.optim.lr_scheduler.LambdaLR(plain, lambda step: min(1.0, step / 5))
    optimizer = wrap(model, plain, adapter)
    next_batch, errors = batches(hvd.rank()), []
    while not any(errors) and len(errors) < 6:
        errors.append(error_of(lambda: train(model, optimizer, next_batch, 1)))
        scheduler.step()
    return errors


def without_the_check():
    model = build_model(seed=hvd.rank())
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05), check_sync=False)
    return {"error": attempt(model, optimizer, 2), "end": digest(model)}


def restored(*, state_first):
    """Rank 0 has a checkpoint of an AdamW, the other rank has nothing; then the broadcasts."""
    model = build_model()
    old = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    train(model, old, batches(0), 2)
    saved = copy.deepcopy((model.state_dict(), old.state_dict()))
    model = build_model(seed=5 + hvd.rank())
    plain = torch.optim.AdamW(model.parameters(), lr=0.5)
    optimizer = wrap(model, plain)
    if hvd.rank() == 0:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    if state_first:
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    if not state_first:
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    start = model.state_dict()["0.weight"].equal(saved[0]["0.weight"])
    error = attempt(model, optimizer, 5)
    lr = optimizer.param_groups[0]["lr"]
    return {"error": error, "start": start, "end": digest(model), "lr": lr}


def require_in_sync():
    same, apart = build_model(), build_model(seed=hvd.rank())
    half = torch.zeros(3, dtype=torch.bfloat16) * (-1) ** hvd.rank()
    return {
        "same": error_of(lambda: ef.require_in_sync(same)),
        "state": error_of(lambda: ef.require_in_sync(same.state_dict())),
        "apart": error_of(lambda: ef.require_in_sync(apart.parameters())),
        "named": error_of(lambda: ef.require_in_sync(apart.named_parameters())),
        "sign of a zero": error_of(lambda: ef.require_in_sync(half)),
        "no tensors": error_of(lambda: ef.require_in_sync([3])),
        "alone": error_of(lambda: ef.require_in_sync(apart, process_set=ALONE)),
    }


ALONE = hvd.ProcessSet([0])


def main() -> None:
    hvd.init(process_sets=[ALONE])
    found = {
        "without_the_check": without_the_check(),
        "usual_order": restored(state_first=False),
        "state_first": restored(state_first=True),
        "require_in_sync": require_in_sync(),
        "rate": other_learning_rate("ef"),
        "frozen": frozen_backbone("ef"),
    }
    found["forgotten"] = forgotten_broadcast("ef")
    # Last, for the stock optimizer has allreduces under way when it raises.
    found["stock frozen"] = frozen_backbone("stock")
    found["stock rate"] = other_learning_rate("stock")
    found["stock forgotten"] = forgotten_broadcast("stock")
    report(hvd.rank(), found)
    hvd.barrier()


main()
