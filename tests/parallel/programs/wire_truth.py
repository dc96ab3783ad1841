"""Bytes by the library's count and by the kernel's, for one way of reducing in torch."""

from __future__ import annotations

import horovod.torch as hvd
import torch
from common import ARGUMENTS
from loopback import ELEMENTS, EXCHANGES, METHODS, compare_horovod

import ef_horovod.torch as ef


def main() -> None:
    hvd.init()
    parameter = torch.nn.Parameter(torch.zeros(ELEMENTS))
    optimizer = ef.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=0.1),
        [("weight", parameter)],
        compression=METHODS[ARGUMENTS[0]],
        dense=lambda name, parameter: False,
        bucket_bytes=4 * ELEMENTS,
        exchange=EXCHANGES.get(ARGUMENTS[0], "auto"),
        check_sync=False,
    )
    gradient = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(hvd.rank()))

    def train(steps: int) -> None:
        for _ in range(steps):
            parameter.grad = None
            (parameter * gradient).sum().backward()
            optimizer.step()

    compare_horovod(hvd, train, optimizer.stats)


main()
