"""Every method x compressor, by both adapters, for 200 steps; digests of the parameters."""

from __future__ import annotations

import horovod.torch as hvd
import torch
from common import ARGUMENTS, report
from torch_common import batches, build_model, digest, train

import ef_horovod.torch as ef
from ef_horovod import registry

STEPS = 200


def wrap(adapter: str, method: ef.Method, model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    if adapter == "ef":
        return ef.DistributedOptimizer(
            optimizer, model.named_parameters(), compression=method, bucket_bytes=10_000
        )
    return hvd.DistributedOptimizer(
        optimizer,
        model.named_parameters(),
        compression=ef.Compression(method, model.named_parameters()),
    )


def main() -> None:
    hvd.init()
    results = {}
    for compressor in [c for cls in registry.COMPRESSORS.values() for c in cls.examples()]:
        for method in [m for cls in registry.METHODS.values() for m in cls.examples(compressor)]:
            model = build_model()
            start = digest(model)
            loss = train(model, wrap(ARGUMENTS[0], method, model), batches(hvd.rank()), STEPS)
            results[repr(method)] = {"start": start, "end": digest(model), "loss": loss}
    report(hvd.rank(), results)


main()
