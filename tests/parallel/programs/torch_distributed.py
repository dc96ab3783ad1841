"""What a wrapped optimizer does over torch.distributed; no module of Horovod can be imported.

Started by torchrun with 4 ranks, which stand for 2 nodes of 2 ranks.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import without_horovod  # noqa: F401
from common import error_of, report
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch_common import batches, build_model, digest, train

import ef_horovod.torch as ef

TOPK = ef.EF21(ef.TopK(0.1))


def wrapped(model, compression=TOPK, kind=ef.DistributedOptimizer, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"transport": "torch"} | options
    return kind(optimizer, model.named_parameters(), compression=compression, **options)


def trained(steps=4, **options):
    model = build_model()
    optimizer = wrapped(model, **options)
    train(model, optimizer, batches(dist.get_rank()), steps)
    return model, optimizer


def has_nan_dropped(rank):
    model, optimizer = trained()
    before, state = digest(model), optimizer.compression_state_dict()
    loss = model(torch.ones(2, 40)).sum() * (float("nan") if rank == 2 else 1.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    after = optimizer.compression_state_dict()
    same = all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(after["parameters"][name][field]))
        for name, fields in state["parameters"].items()
        for field, value in fields.items()
    )
    return bool(optimizer.step_skipped) and same and digest(model) == before


def goes_on_after_checkpoint(rank):
    whole, _ = trained(steps=6)
    next_batch = batches(rank)
    model = build_model()
    optimizer = wrapped(model)
    train(model, optimizer, next_batch, 3)
    state = optimizer.checkpoint()
    optimizer.unwrap()
    again = wrapped(model)
    again.load_compression_state_dict(state)
    train(model, again, next_batch, 3)
    return digest(model) == digest(whole)


def unused_layers(rank):
    """Each rank leaves out another layer, so hooks come in another order."""
    model = torch.nn.ModuleList([torch.nn.Linear(40, 40) for _ in range(4)])
    for p in model.parameters():
        torch.nn.init.constant_(p, 0.01)
    optimizer = wrapped(model, bucket_bytes=6400)
    for step in range(4):
        x = torch.full((2, 40), 1.0 + rank)
        for i in [j for j in range(4) if j != rank] if step else range(4):
            x = model[(i + rank) % 4](x)
        optimizer.zero_grad()
        x.sum().backward()
        optimizer.step()
    return digest(model)


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    os.environ["GROUP_RANK"] = str(rank // 2)
    result = {"nan": has_nan_dropped(rank), "checkpoint": goes_on_after_checkpoint(rank)}
    result["unused"] = unused_layers(rank)
    ways = {
        "default": {"transport": None},
        "gather": {"exchange": "gather"},
        "double_pass": {"exchange": "double_pass"},
        "hierarchical": {"exchange": "hierarchical"},
        "reduce": {"compression": ef.ErrorFeedback(ef.RandomK(0.1))},
        "unequal": {"compression": ef.ErrorFeedback(ef.HardThreshold(0.01))},
        "updates": {"kind": ef.CompressedUpdates},
    }
    for name, options in ways.items():
        model, optimizer = trained(**options)
        result[name] = [
            digest(model),
            optimizer.transport.bytes_sent,
            type(optimizer.transport).__name__,
        ]
    result["config"] = error_of(lambda: trained(compression=ef.EF21(ef.TopK(0.1 + 0.1 * rank))))
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    of_half = ef.TorchDistributed(halves[rank // 2])
    result["half"] = [digest(trained(transport=of_half)[0]), of_half.size, of_half.who]
    result["outside"] = error_of(lambda: ef.TorchDistributed(halves[1 - rank // 2]))
    result["in_sync"] = error_of(
        lambda: ef.require_in_sync([torch.full((3,), float(rank))], transport=ef.TorchDistributed())
    )
    result["wrong"] = error_of(lambda: trained(transport="mpi"))
    mesh = init_device_mesh("cpu", (4,))
    sharded = distribute_tensor(torch.ones(8, 8), mesh)
    result["sharded"] = error_of(
        lambda: ef.DistributedOptimizer(torch.optim.SGD([torch.nn.Parameter(sharded)], lr=0.1))
    )
    result["horovod"] = error_of(lambda: trained(transport="horovod"))
    late = ef.TorchDistributed(timeout=1.0)
    if rank == 0:
        result["late"] = error_of(lambda: late.barrier("meeting"))
    dist.barrier()  # so that the others do not end before
    report(rank, result)


main()
