"""What must be refused, on every rank, in time. Rank 1 is the odd one out."""

from __future__ import annotations

import copy
import time

import horovod.torch as hvd
import torch
from common import ARGUMENTS, error_of, report
from torch_common import batches, build_model, digest, train

import ef_horovod.torch as ef

SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def odd():
    return hvd.rank() == 1


def wrap(adapter, model, method, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    if adapter == "ef":
        return ef.DistributedOptimizer(
            optimizer, model.named_parameters(), compression=method, **options
        )
    return hvd.DistributedOptimizer(
        optimizer,
        model.named_parameters(),
        compression=ef.Compression(method, model.named_parameters(), **options),
    )


@scenario
def another_compressor(adapter):
    method = ef.ErrorFeedback(ef.TopK(ratio=0.02 if odd() else 0.01))
    model = build_model()
    return error_of(lambda: train(model, wrap(adapter, model, method), batches(0), 1))


@scenario
def another_shape(adapter):
    width = 61 if odd() else 60
    model = torch.nn.Sequential(torch.nn.Linear(40, width), torch.nn.Linear(width, 10))
    method = ef.ErrorFeedback(ef.OneBit())
    return error_of(lambda: train(model, wrap(adapter, model, method), batches(0), 1))


@scenario
def another_name(adapter):
    layers = {"input": torch.nn.Linear(40, 50), "b" if odd() else "a": torch.nn.Linear(50, 10)}
    model = torch.nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    method = ef.ErrorFeedback(ef.OneBit())
    return error_of(lambda: train(model, wrap(adapter, model, method), batches(0), 1))


def memories(adapter, optimizer):
    if adapter == "ef":
        return optimizer.compression_state_dict()
    return optimizer._compression.state_dict()


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@scenario
def not_finite(adapter):
    """A NaN on the last rank only, in a matrix, then in a bias: dropped everywhere."""
    model, next_batch = build_model(), batches(hvd.rank())
    optimizer = wrap(adapter, model, ef.EF21(ef.TopK(ratio=0.05), momentum=0.5))
    train(model, optimizer, next_batch, 5)
    kept = []
    for poisoned in (model[2].weight, model[2].bias):
        before, state = digest(model), copy.deepcopy(optimizer.state_dict())
        memory = copy.deepcopy(memories(adapter, optimizer))
        inputs, labels = next_batch()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        if hvd.rank() == hvd.size() - 1:
            loss = loss + poisoned.view(-1)[0] * float("inf")
        loss.backward()
        optimizer.step()
        kept.append(
            digest(model) == before
            and equal(optimizer.state_dict(), state)
            and equal(memories(adapter, optimizer), memory)
        )
    source = optimizer if adapter == "ef" else optimizer._compression
    skipped = source.stats()[-1].skipped
    train(model, optimizer, next_batch, 5)
    return {"kept": kept, "skipped": skipped, "after": digest(model), "before": before}


@scenario
def missing_rank(adapter):
    model = build_model()

    def make():
        return wrap(adapter, model, ef.ErrorFeedback(ef.OneBit()), timeout=3.0)

    if adapter == "ef":
        optimizer = make()
        train(model, optimizer, batches(hvd.rank()), 2)
    begin = time.monotonic()
    if odd():
        time.sleep(8)
        return ""
    if adapter == "ef":
        error = error_of(lambda: train(model, optimizer, batches(0), 3))
    else:  # in its steps the stock optimizer waits without a limit
        error = error_of(make)
    seconds = time.monotonic() - begin
    time.sleep(max(0, 8 - seconds))  # a rank that ends early shuts Horovod down for all
    return f"{seconds:.1f} {error}"


def main() -> None:
    hvd.init()
    found: dict[str, dict] = {adapter: {} for adapter in ARGUMENTS}
    for name, run in SCENARIOS.items():
        for adapter in ARGUMENTS:
            found[adapter][name] = run(adapter)
    report(hvd.rank(), found)


main()
