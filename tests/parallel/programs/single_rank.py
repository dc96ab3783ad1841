"""One rank: the wrapped optimizer is the plain one."""

from __future__ import annotations

import horovod.torch as hvd
import torch
from common import report
from torch_common import batches, build_model, digest, train

import ef_horovod.torch as ef

METHOD = ef.EF21(ef.TopK(ratio=0.01))


def end(wrap) -> str:
    model = build_model()
    optimizer = wrap(torch.optim.Adam(model.parameters(), lr=0.01), model)
    train(model, optimizer, batches(0), 20)
    return digest(model)


def ours(optimizer, model):
    return ef.DistributedOptimizer(optimizer, model.named_parameters(), compression=METHOD)


def stock(optimizer, model):
    adapter = ef.Compression(METHOD, model.named_parameters())
    return hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=adapter)


hvd.init()
report(hvd.rank(), {"plain": end(lambda o, m: o), "ef": end(ours), "stock": end(stock)})
