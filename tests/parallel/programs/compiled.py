"""`torch.compile` around a step, and compiled autograd: as plain Horovod takes them.

Argument: "all", or "some" to compile no training without compression.
"""

from __future__ import annotations

import horovod.torch as hvd
import torch
from common import ARGUMENTS, report
from torch_common import batches, build_model, digest

import ef_horovod.torch as ef

IDENTITY, TOPK = ef.NoFeedback(ef.Identity()), ef.EF21(ef.TopK(ratio=0.1))
STEPS = 4


def plain(optimizer, model, method):
    return hvd.DistributedOptimizer(optimizer, model.named_parameters())


def ours(optimizer, model, method):
    return ef.DistributedOptimizer(optimizer, model.named_parameters(), compression=method)


def stock(optimizer, model, method):
    adapter = ef.Compression(method, model.named_parameters())
    return hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=adapter)


def train(wrap, method, way):
    torch._dynamo.reset()
    model, next_batch = build_model(), batches(hvd.rank())
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model, method)

    def backward(batch):
        torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()

    def whole(batch):
        optimizer.zero_grad()
        backward(batch)
        optimizer.step()

    compiled = torch.compile(whole, backend="eager")
    for _ in range(STEPS):
        batch = next_batch()
        if way == "step":
            compiled(batch)
        elif way == "autograd":
            optimizer.zero_grad()
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                backward(batch)
            optimizer.step()
        else:
            whole(batch)
    return digest(model)


def main() -> None:
    hvd.init()
    ends = {}
    for way in ("eager", "step", "autograd"):
        ends[way] = {}
        if way == "eager" or ARGUMENTS == ["all"]:
            ends[way] |= {
                "plain": train(plain, IDENTITY, way),
                "ours": train(ours, IDENTITY, way),
                "stock": train(stock, IDENTITY, way),
            }
        ends[way] |= {
            "ours, top-k": train(ours, TOPK, way),
            "stock, top-k": train(stock, TOPK, way),
        }
    report(hvd.rank(), ends)


main()
