"""The double pass by both PyTorch adapters, as training loops use it; facts for the tests."""

from __future__ import annotations

import copy
import io
import time

import horovod.torch as hvd
import numpy as np
import torch
from common import ARGUMENTS, error_of, report
from torch_common import batches, build_model, digest, train

import ef_horovod.torch as ef
from ef_horovod import simulate

TOP, SIGNS = ef.TopK(ratio=0.1), ef.OneBit()
BOTH_WAYS = ef.DoubleSqueeze(TOP, server_compressor=SIGNS)
METHODS = (
    BOTH_WAYS,
    ef.EF21(SIGNS, server_compressor=SIGNS),
    ef.EF21(TOP, momentum=0.5),
    ef.EF21(TOP, participation=0.5),
    ef.ErrorFeedback(ef.RandomK(ratio=0.1)),
    ef.DoubleSqueeze(ef.HardThreshold(0.01), server_compressor=ef.HardThreshold(0.01)),
    ef.ErrorCompensatedX(SIGNS, server_compressor=SIGNS, alpha=0.5),
    ef.EF21Plus(TOP),
)
STEPS = 40


def wrap(adapter, model, method=BOTH_WAYS, **options):
    options = {"exchange": "double_pass", "seed": 3} | options
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    named = list(model.named_parameters())
    if adapter == "ef":
        return ef.DistributedOptimizer(
            optimizer, named, compression=method, bucket_bytes=10_000, **options
        )
    adapted = ef.Compression(method, named, **options)
    return hvd.DistributedOptimizer(
        optimizer, named, compression=adapted, process_set=options.get("process_set", WORLD)
    )


def source(adapter, optimizer):
    return optimizer if adapter == "ef" else optimizer._compression


def trainings():
    ends = {}
    for adapter in ("ef", "stock"):
        for method in METHODS if adapter == "ef" else METHODS[:2]:
            model = build_model()
            start = digest(model)
            loss = train(model, wrap(adapter, model, method), batches(hvd.rank()), STEPS)
            ends[f"{adapter} {method}"] = {"start": start, "end": digest(model), "loss": loss}
    return ends


def memories(adapter, optimizer):
    if adapter == "ef":
        return copy.deepcopy(optimizer.compression_state_dict())
    return copy.deepcopy(optimizer._compression.state_dict())


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def not_finite():
    """A NaN on the last rank, in one entry of one matrix: nothing changes anywhere."""
    facts = {}
    for adapter in ("ef", "stock"):
        model, next_batch = build_model(), batches(hvd.rank())
        optimizer = wrap(adapter, model)
        train(model, optimizer, next_batch, 5)
        before, memory = digest(model), memories(adapter, optimizer)
        inputs, labels = next_batch()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        if hvd.rank() == hvd.size() - 1:
            loss = loss + model[2].weight.view(-1)[0] * float("inf")
        loss.backward()
        optimizer.step()
        kept = digest(model) == before and equal(memories(adapter, optimizer), memory)
        skipped = source(adapter, optimizer).stats()[-1].skipped
        train(model, optimizer, next_batch, 5)
        facts[adapter] = {"kept": kept, "skipped": skipped, "end": digest(model), "before": before}
    return facts


def resumed():
    """10 steps, and 10 more in new objects from what was saved: the bits of 20."""
    whole_model, next_batch = build_model(), batches(hvd.rank())
    whole = wrap("ef", whole_model)
    train(whole_model, whole, next_batch, 10)
    file = io.BytesIO()
    saved = {"model": whole_model.state_dict(), "optimizer": whole.state_dict()}
    torch.save(saved | {"compression": whole.compression_state_dict()}, file)
    train(whole_model, whole, next_batch, 10)
    file.seek(0)
    loaded = torch.load(file)
    model, next_batch = build_model(seed=5), batches(hvd.rank())
    for _ in range(10):
        next_batch()
    model.load_state_dict(loaded["model"])
    again = wrap("ef", model)
    again.load_state_dict(loaded["optimizer"])
    again.load_compression_state_dict(loaded["compression"])
    train(model, again, next_batch, 10)
    held = sorted({key for of in loaded["compression"]["parameters"].values() for key in of})
    return {"whole": digest(whole_model), "again": digest(model), "held": held}


def as_in_one_process():
    """A matrix's steps against the simulation, and the bytes that were sent."""
    shape, same, sent = (64, 128), {}, {}

    def gradient(rank, step):
        return np.random.default_rng((rank, step)).standard_normal(shape, np.float32)

    for method in METHODS:
        x = torch.nn.Parameter(torch.zeros(shape))
        optimizer = ef.DistributedOptimizer(
            torch.optim.SGD([x], lr=1.0), [("x", x)], compression=method,
            exchange="double_pass", seed=3,
        )  # fmt: skip
        for step in range(5):
            optimizer.zero_grad()
            (x * torch.from_numpy(gradient(hvd.rank(), step))).sum().backward()
            optimizer.step()
        run = simulate(
            method, lambda rank, x, step: gradient(rank, step), np.zeros(shape, np.float32),
            workers=hvd.size(), steps=5, step_size=1.0, seed=3, name="bucket.0",
            exchange="double_pass",
        )  # fmt: skip
        same[repr(method)] = x.detach().numpy().tobytes() == run.x.tobytes()
        stats = optimizer.stats()[0]
        sent[repr(method)] = [stats.bytes_out, stats.bytes_in, run.bytes_sent]
    return {"same": same, "sent": sent}


def process_set():
    """The first and the last rank alone; where there are three, one is outside."""
    ends = {}
    for adapter in ("ef", "stock"):
        model = build_model()
        optimizer = wrap(adapter, model, process_set=ENDS)
        train(model, optimizer, batches(hvd.rank()), 10)
        ends[adapter] = digest(model)
    return ends


def refused():
    model = build_model()
    errors = [
        error_of(lambda: wrap("ef", model, ef.PowerSGD(rank=2))),
        error_of(lambda: wrap("stock", model, ef.PowerSGD(rank=2))),
    ]
    other = "gather" if hvd.rank() == 1 else "double_pass"
    optimizer = wrap("ef", model, ef.ErrorFeedback(TOP), exchange=other)
    return [*errors, error_of(lambda: train(model, optimizer, batches(0), 1))]


def missing_rank():
    """The last rank does not come: the others say in what, and for how long, they waited."""
    model = build_model()
    optimizer = wrap("ef", model, timeout=3.0)
    train(model, optimizer, batches(hvd.rank()), 2)
    begin = time.monotonic()
    if hvd.rank() == hvd.size() - 1:
        time.sleep(8)
        return ""
    error = error_of(lambda: train(model, optimizer, batches(0), 3))
    seconds = time.monotonic() - begin
    time.sleep(max(0, 8 - seconds))  # a rank that ends early shuts Horovod down for all
    return f"{seconds:.1f} {error}"


SCENARIOS = (
    trainings, not_finite, resumed, as_in_one_process, process_set, refused, missing_rank,
)  # fmt: skip

RANKS = int(ARGUMENTS[0])
WORLD = hvd.global_process_set
ENDS = hvd.ProcessSet([0, RANKS - 1]) if RANKS > 2 else WORLD  # each set once


def main() -> None:
    hvd.init(process_sets=[ENDS] if RANKS > 2 else [])
    report(hvd.rank(), {scenario.__name__: scenario() for scenario in SCENARIOS})


main()
