"""Many methods x compressors, by both adapters; digests of the parameters.

Arguments: adapters ("ef", "stock" or "ef,stock"), pairs ("all", "selection" or "methods"), steps,
and a device if it is not the CPU.
"""

from __future__ import annotations

import horovod.torch as hvd
import torch
from common import ARGUMENTS, report
from one_of_each import chosen
from torch_common import batches, build_model, digest, train

import ef_horovod.torch as ef


def wrap(adapter: str, method: ef.Method, model: torch.nn.Module) -> torch.optim.Optimizer:
    momentum = 0.0 if method.replaces_optimizer else 0.5
    lr, dense_steps = (0.003, 10) if method.makes_updates else (0.05, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    if adapter == "ef":
        return ef.DistributedOptimizer(
            optimizer,
            model.named_parameters(),
            compression=method,
            bucket_bytes=10_000,
            dense_steps=dense_steps,
        )
    return hvd.DistributedOptimizer(
        optimizer,
        model.named_parameters(),
        compression=ef.Compression(method, model.named_parameters(), dense_steps=dense_steps),
    )


def main() -> None:
    hvd.init()
    adapters, which, steps, *device = ARGUMENTS
    results: dict[str, dict] = {adapter: {} for adapter in adapters.split(",")}
    for adapter, found in results.items():
        for method in chosen(which):
            model = build_model().to(*device)
            start = digest(model)
            loss = train(model, wrap(adapter, method, model), batches(hvd.rank()), int(steps))
            found[repr(method)] = {"start": start, "end": digest(model), "loss": loss}
    report(hvd.rank(), results)


main()
