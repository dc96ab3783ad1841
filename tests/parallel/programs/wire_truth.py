"""Bytes by the library's count and by the kernel's, for ways of reducing in torch, one by one."""

from __future__ import annotations

import horovod.torch as hvd
import torch
from common import ARGUMENTS, report
from loopback import ELEMENTS, EXCHANGES, METHODS, compare_horovod

import ef_horovod.torch as ef


def counts_of(name: str) -> dict[str, float]:
    parameter = torch.nn.Parameter(torch.zeros(ELEMENTS))
    optimizer = ef.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=0.1),
        [("weight", parameter)],
        compression=METHODS[name],
        dense=lambda name, parameter: False,
        bucket_bytes=4 * ELEMENTS,
        exchange=EXCHANGES.get(name, "auto"),
        check_sync=False,
    )
    gradient = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(hvd.rank()))

    def train(steps: int) -> None:
        for _ in range(steps):
            parameter.grad = None
            (parameter * gradient).sum().backward()
            optimizer.step()

    return compare_horovod(hvd, train, optimizer.stats)


hvd.init()
report(hvd.rank(), {name: counts_of(name) for name in ARGUMENTS})
