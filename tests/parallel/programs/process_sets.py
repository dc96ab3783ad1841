"""Ranks 0 and 2 of three train together; rank 1 is left alone."""

from __future__ import annotations

import horovod.torch as hvd
import torch
from common import report
from torch_common import batches, build_model, digest, train

import ef_horovod.torch as ef

METHOD = ef.ErrorFeedback(ef.TopK(ratio=0.05))


def main() -> None:
    pair = hvd.ProcessSet([0, 2])
    hvd.init(process_sets=[pair])
    ends = {}
    for adapter in ("ef", "stock"):
        model = build_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        named = list(model.named_parameters())
        if adapter == "ef":
            optimizer = ef.DistributedOptimizer(
                optimizer, named, compression=METHOD, process_set=pair
            )
        else:
            adapted = ef.Compression(METHOD, named, process_set=pair)
            optimizer = hvd.DistributedOptimizer(
                optimizer, named, compression=adapted, process_set=pair
            )
        train(model, optimizer, batches(hvd.rank()), 10)
        ends[adapter] = digest(model)
    alone = build_model()
    train(alone, torch.optim.SGD(alone.parameters(), lr=0.05), batches(hvd.rank()), 10)
    ends["alone"] = digest(alone)
    report(hvd.rank(), ends)
    hvd.barrier()  # a rank that ends early shuts Horovod down for all


main()
