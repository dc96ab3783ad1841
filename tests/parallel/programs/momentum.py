"""MomentumCorrection and FrozenAdam in training loops of PyTorch, on one rank or more."""

from __future__ import annotations

import horovod.torch as hvd
import torch
from common import error_of, report
from torch_common import batches, build_model, digest, flat, train

import ef_horovod.torch as ef

TOP = ef.MomentumCorrection(ef.TopK(ratio=0.05))
cross_entropy = torch.nn.functional.cross_entropy


ADAM = ef.FrozenAdam(ef.OneBit())


def wrapped(
    model, method=TOP, kind=torch.optim.SGD, *, lr=0.05, dense_steps=0, op=hvd.Average, **options
):
    return ef.DistributedOptimizer(
        kind(model.parameters(), lr=lr, **options),
        model.named_parameters(),
        compression=method,
        dense_steps=dense_steps,
        op=op,
    )


def stock(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, **options)
    return hvd.DistributedOptimizer(
        optimizer,
        model.named_parameters(),
        compression=ef.Compression(TOP, model.named_parameters()),
    )


def sgd_of_pytorch(nesterov, weight_decay):
    """The end of torch.optim.SGD with momentum on averages of plain Horovod."""
    options = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay}
    return end_of_pytorch(torch.optim.SGD, lr=0.05, **options)


def end_of_pytorch(kind, **options):
    model, next_batch = build_model(), batches(hvd.rank())
    optimizer = kind(model.parameters(), **options)
    for _ in range(20):
        inputs, labels = next_batch()
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        for p in model.parameters():
            p.grad.copy_(hvd.allreduce(p.grad))
        optimizer.step()
    return flat(model)


def without_compression():
    """Largest differences from SGD with momentum, and how far its parameters went."""
    facts, start = {}, flat(build_model())
    for nesterov in (False, True):
        for weight_decay in (0.0, 0.1):
            model = build_model()
            method = ef.MomentumCorrection(ef.Identity(), nesterov=nesterov)
            optimizer = wrapped(model, method, weight_decay=weight_decay)
            train(model, optimizer, batches(hvd.rank()), 20)
            expected = sgd_of_pytorch(nesterov, weight_decay)
            facts[f"nesterov={nesterov}, weight_decay={weight_decay}"] = {
                "off": float((flat(model) - expected).abs().max()),
                "moved": float((expected - start).abs().max()),
            }
    return facts


def adam():
    """Dense steps only, and with compression after them, against torch.optim.AdamW."""
    expected, start = (
        end_of_pytorch(torch.optim.AdamW, lr=0.003, weight_decay=0.1),
        flat(build_model()),
    )
    facts = {"moved": float((expected - start).abs().max())}
    for dense_steps in (20, 12):
        model = build_model()
        optimizer = wrapped(model, ADAM, lr=0.003, weight_decay=0.1, dense_steps=dense_steps)
        train(model, optimizer, batches(hvd.rank()), 20)
        facts[f"off, {dense_steps}"] = float((flat(model) - expected).abs().max())
    return facts


def sums():
    """The ends with averages and with sums, by both adapters: Adam's updates are the same."""
    ends = []
    for op in (hvd.Average, hvd.Sum):
        model = build_model()
        optimizer = wrapped(model, ADAM, lr=0.003, dense_steps=5, op=op)
        train(model, optimizer, batches(hvd.rank()), 10)
        ends.append(digest(model))
    for op in (hvd.Average, hvd.Sum) if hvd.size() > 1 else ():
        model = build_model()
        compression = ef.Compression(ADAM, model.named_parameters(), dense_steps=5)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.003),
            model.named_parameters(),
            compression=compression,
            op=op,
        )
        train(model, optimizer, batches(hvd.rank()), 10)
        ends.append(digest(model))
    return ends


def of_adam():
    """What is refused beside FrozenAdam."""
    kinds = {
        "AdamW": lambda: wrapped(build_model(), ADAM, torch.optim.AdamW, dense_steps=2),
        "momentum": lambda: wrapped(build_model(), ADAM, momentum=0.5, dense_steps=2),
        "dense steps": lambda: wrapped(build_model(), ADAM),
    }
    model = build_model()
    optimizer = wrapped(model, ADAM, dense_steps=2)
    train(model, optimizer, batches(hvd.rank()), 1)
    inputs, labels = batches(hvd.rank())()
    cross_entropy(model(inputs), labels).backward()
    return {name: error_of(kind) for name, kind in kinds.items()} | {
        "synchronize": error_of(optimizer.synchronize)
    }


def checkpoint():
    """Stop after 7 of 20 steps and go on in new objects, with the decay's velocity."""

    def run(model, optimizer, next_batch, steps):
        train(model, optimizer, next_batch, steps)
        return optimizer.compression_state_dict()

    whole, next_batch = build_model(), batches(hvd.rank())
    optimizer = wrapped(whole, weight_decay=0.1)
    saved = run(whole, optimizer, next_batch, 7)
    again = build_model(seed=9)
    again.load_state_dict(whole.state_dict())
    resumed = wrapped(again, weight_decay=0.1)
    resumed.load_compression_state_dict(saved)
    run(whole, optimizer, next_batch, 13)
    next_batch = batches(hvd.rank())
    for _ in range(7):
        next_batch()
    run(again, resumed, next_batch, 13)
    return {"whole": digest(whole), "again": digest(again), "decays": sorted(saved["decay"])}


def change_later():
    model = build_model()
    optimizer = wrapped(model)
    train(model, optimizer, batches(hvd.rank()), 2)
    optimizer.param_groups[0]["momentum"] = 0.5
    return error_of(lambda: train(model, optimizer, batches(hvd.rank()), 1))


def embedding():
    model = torch.nn.EmbeddingBag(100, 50, sparse=True)
    optimizer = wrapped(model)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    return error_of(optimizer.step)


def refusals():
    facts = {
        "momentum": error_of(lambda: wrapped(build_model(), momentum=0.5)),
        "betas": error_of(lambda: wrapped(build_model(), kind=torch.optim.Adam)),
        "later": change_later(),
    }
    if hvd.size() == 1:
        return facts | {"stock": error_of(lambda: stock(build_model()))}

    def first_step(**options):
        model = build_model()
        return error_of(lambda: train(model, stock(model, **options), batches(hvd.rank()), 1))

    return facts | {
        "sparse": embedding(),
        "stock, momentum": first_step(momentum=0.5),
        "stock, weight decay": first_step(weight_decay=0.1),
        "stock": first_step(),
    }


def main() -> None:
    hvd.init()
    scenarios = (without_compression, adam, sums, of_adam, checkpoint, refusals)
    report(hvd.rank(), {scenario.__name__: scenario() for scenario in scenarios})


main()
