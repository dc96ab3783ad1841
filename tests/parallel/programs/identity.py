"""Identity through both adapters against plain Horovod, and Sum against Average."""

from __future__ import annotations

import horovod.torch as hvd
import torch
from common import report
from torch_common import batches, build_model, flat, train

import ef_horovod.torch as ef


def trained(wrap) -> list[float]:
    model = build_model()
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model)
    train(model, optimizer, batches(hvd.rank()), 50)
    return flat(model).tolist()


def ours(optimizer, model, **options):
    options.setdefault("compression", ef.NoFeedback(ef.Identity()))
    return ef.DistributedOptimizer(optimizer, model.named_parameters(), **options)


def stock(optimizer, model, **options):
    return hvd.DistributedOptimizer(optimizer, model.named_parameters(), **options)


def adapter(method, model):
    return ef.Compression(method, model.named_parameters())


def main() -> None:
    hvd.init()
    identity, feedback = ef.NoFeedback(ef.Identity()), ef.ErrorFeedback(ef.Identity())
    onebit = ef.ErrorFeedback(ef.OneBit())
    everything = {"dense": lambda name, parameter: False}
    results = {
        "horovod": trained(stock),
        "ef dense": trained(ours),
        "ef reduce": trained(lambda o, m: ours(o, m, compression=feedback, **everything)),
        "ef gather": trained(
            lambda o, m: ours(o, m, compression=feedback, exchange="gather", **everything)
        ),
        "ef late": trained(lambda o, m: ours(o, m, overlap=False)),
        "stock dense": trained(lambda o, m: stock(o, m, compression=adapter(identity, m))),
        "stock reduce": trained(lambda o, m: stock(o, m, compression=adapter(feedback, m))),
        "horovod sum": trained(lambda o, m: stock(o, m, op=hvd.Sum)),
        "ef sum": trained(lambda o, m: ours(o, m, op=hvd.Sum)),
        "onebit sum, ef": trained(
            lambda o, m: ours(o, m, op=hvd.Sum, compression=onebit, bucket_bytes=1)
        ),
        "onebit sum, stock": trained(
            lambda o, m: stock(o, m, op=hvd.Sum, compression=adapter(onebit, m))
        ),
    }
    report(hvd.rank(), results)


main()
