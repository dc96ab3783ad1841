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


def adapter(method, model, **options):
    return ef.Compression(method, model.named_parameters(), **options)


def where_they_lie() -> list[dict[str, bool]]:
    """Steps of two large matrices, the second one with columns in memory as rows."""
    rank, size = hvd.rank(), hvd.size()
    one, two = (torch.nn.Parameter(torch.zeros(300, 70)) for _ in range(2))
    two.data = torch.zeros(70, 300).t()
    plain = torch.optim.SGD([one, two], lr=0.0)
    optimizer = ef.DistributedOptimizer(plain, [("one", one), ("two", two)])
    mean, found = sum(range(1, size + 1)) / size, []
    for without, bad in ((False, False), (True, False), (False, True), (False, False)):
        optimizer.zero_grad()
        loss = two.sum() * (rank + 1)
        if not (without and rank == 0):
            loss = loss + one.sum() * (float("nan") if bad and rank == 0 else rank + 1)
        loss.backward()
        before = one.grad.data_ptr() if one.grad is not None else 0
        optimizer.synchronize()
        expected = mean - (1 / size if without else 0)
        right = [bool((p.grad == value).all()) for p, value in ((one, expected), (two, mean))]
        lost = all(bool(p.grad.isnan().all()) for p in (one, two))
        found.append(
            {
                "right": (lost and optimizer.step_skipped) if bad else all(right),
                "in place": one.grad.data_ptr() == before,
            }
        )
        with optimizer.skip_synchronize():
            optimizer.step()
    return found


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
    }
    for name, size in (("one bucket", 25 * 2**20), ("small buckets", 1)):
        results[f"{name}, ef"] = trained(
            lambda o, m, b=size: ours(o, m, op=hvd.Sum, compression=onebit, bucket_bytes=b)
        )
        results[f"{name}, stock"] = trained(
            lambda o, m, b=size: stock(
                o, m, op=hvd.Sum, compression=adapter(onebit, m, bucket_bytes=b)
            )
        )
    report(hvd.rank(), results | {"where they lie": where_they_lie()})


main()
