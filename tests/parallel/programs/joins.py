"""Rank 0 calls Horovod's own join while rank 1 trains on: then Horovod can shut down no more."""

from __future__ import annotations

import horovod.torch as hvd
from horovod.torch import join  # before ef_horovod puts a guard in its place

import torch  # isort: skip
from common import error_of, report
from torch_common import batches, build_model, train

import ef_horovod.torch as ef
from ef_horovod.transports.timeouts import ending


def main() -> None:
    hvd.init()
    ending._GRACE_SECONDS = 2.0 if hvd.rank() else 20.0  # the one whose end is looked at, first
    model = build_model()
    optimizer = ef.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model.named_parameters(),
        compression=ef.EF21(ef.TopK(ratio=0.05)),
        timeout=3.0,
    )
    train(model, optimizer, batches(hvd.rank()), 2)
    rank = hvd.rank()
    error = error_of(join if rank == 0 else lambda: train(model, optimizer, batches(rank), 2))
    report(rank, {"error": error})


main()
