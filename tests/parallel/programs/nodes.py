"""Several ranks on a node by both PyTorch adapters; facts for the tests.

Arguments: which methods take steps, of `cases_by_nodes`; and "pretend" for nodes of two over MPI.
"""

from __future__ import annotations

import copy
import io
import time

import horovod.torch as hvd
import numpy as np
import torch
from common import ARGUMENTS, error_of, report
from pretended_nodes import pretend
from same_gradients import SEED, SHAPE, cases_by_nodes, dense_steps_of
from same_gradients import STEPS as FEW_STEPS
from same_gradients import digest as digest_of
from same_gradients import gradient as gradient_of
from torch_common import batches, build_model, digest, train

import ef_horovod.torch as ef
from ef_horovod import simulate
from ef_horovod.exchange.channel import finish_step
from ef_horovod.training.choice import open_channel
from ef_horovod.transports.horovod_torch import HorovodTorchTransport

TOP, SIGNS = ef.TopK(ratio=0.1), ef.OneBit()
METHODS = (
    (ef.ErrorFeedback(TOP), {}),
    (ef.EF21(SIGNS, server_compressor=SIGNS), {"exchange": "hierarchical:double_pass"}),
    (ef.EF21Plus(TOP), {}),
    (ef.ErrorFeedback(ef.RandomK(ratio=0.1)), {}),
    (ef.NoFeedback(ef.QSGD(16)), {}),
    (ef.ErrorFeedback(ef.HardThreshold(0.01)), {}),
    (ef.MomentumCorrection(TOP), {"dense_steps": 5}),
    (ef.FrozenAdam(SIGNS), {"dense_steps": 15}),
)
STEPS = 25


def wrap(adapter, model, method=METHODS[0][0], **options):
    options = {"exchange": "hierarchical", "seed": 3} | options
    rate = 0.003 if method.makes_updates else 0.05 if method.sgd_momentum else 0.3
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    named = list(model.named_parameters())
    if adapter == "ef":
        return ef.DistributedOptimizer(
            optimizer, named, compression=method, bucket_bytes=10_000, **options
        )
    adapted = ef.Compression(method, named, **options)
    return hvd.DistributedOptimizer(optimizer, named, compression=adapted)


def source(adapter, optimizer):
    return optimizer if adapter == "ef" else optimizer._compression


def trainings():
    ends = {}
    for adapter in ("ef", "stock"):
        # The others take steps in `every_method`.
        for method, options in METHODS[:2] + METHODS[6:] * (adapter == "ef"):
            model = build_model()
            optimizer = wrap(adapter, model, method, **options)
            loss = train(model, optimizer, batches(hvd.rank()), STEPS)
            exchanges = sorted({row.exchange for row in source(adapter, optimizer).stats()})
            end = {"end": digest(model), "loss": loss, "exchanges": exchanges}
            ends[f"{adapter} {method}"] = end
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
        facts[adapter] = {"kept": kept, "skipped": skipped, "end": digest(model)}
    return facts


def resumed():
    """10 steps, and 10 more in new objects from what was saved: the bits of 20."""
    whole_model, next_batch = build_model(), batches(hvd.rank())
    whole = wrap("ef", whole_model)
    train(whole_model, whole, next_batch, 10)
    file = io.BytesIO()
    torch.save({"model": whole_model.state_dict(), "ef": whole.compression_state_dict()}, file)
    train(whole_model, whole, next_batch, 10)
    file.seek(0)
    loaded = torch.load(file)
    model, next_batch = build_model(seed=5), batches(hvd.rank())
    for _ in range(10):
        next_batch()
    model.load_state_dict(loaded["model"])
    again = wrap("ef", model)
    again.load_compression_state_dict(loaded["ef"])
    train(model, again, next_batch, 10)
    held = sorted({key for of in loaded["ef"]["parameters"].values() for key in of})
    elements = sum(len(v) for of in loaded["ef"]["parameters"].values() for v in of.values())
    ends = {"whole": digest(whole_model), "again": digest(model)}
    return {**ends, "held": held, "elements": elements}


def as_in_one_process():
    """A matrix's steps, whose sums are exact, against the simulation, and the bytes."""
    if hvd.size() != 4:
        return {}
    shape, same, sent = (64, 128), {}, {}

    def gradient(rank, step):
        return np.random.default_rng((rank, step)).integers(-8, 9, shape).astype(np.float32)

    for method, options in METHODS[:6]:
        exchange = options.get("exchange", "hierarchical")
        x = torch.nn.Parameter(torch.zeros(shape))
        optimizer = ef.DistributedOptimizer(
            torch.optim.SGD([x], lr=1.0), [("x", x)], compression=method, exchange=exchange, seed=3
        )
        for step in range(5):
            optimizer.zero_grad()
            (x * torch.from_numpy(gradient(hvd.rank(), step))).sum().backward()
            optimizer.step()
        run = simulate(
            method, lambda rank, x, step: gradient(rank, step), np.zeros(shape, np.float32),
            workers=4, ranks_per_node=2, steps=5, step_size=1.0, seed=3, name="bucket.0",
            exchange=exchange,
        )  # fmt: skip
        same[repr(method)] = x.detach().numpy().tobytes() == run.x.tobytes()
        stats = optimizer.stats()[0]
        sent[repr(method)] = [stats.bytes_out, run.bytes_sent]
    return {"same": same, "sent": sent}


def every_method():
    """One channel of each method, all under way at once; where the steps lead."""
    transport = HorovodTorchTransport("every")
    zeros = torch.zeros(SHAPE).reshape(-1)
    channels = {
        f"{method} by {exchange}": open_channel(
            f"x{i}", zeros, method, transport, exchange=exchange, seed=SEED,
            dense_steps=dense_steps_of(method),
        )
        for i, (method, exchange) in enumerate(cases_by_nodes(ARGUMENTS[0]))
    }  # fmt: skip
    x = dict.fromkeys(channels, 0)
    for step in range(FEW_STEPS):
        for channel in channels.values():
            channel.gradient[:] = torch.from_numpy(gradient_of(hvd.rank(), step).reshape(-1))
            channel.start(step)
        directions = finish_step(list(channels.values()))
        for name, direction in zip(x, directions, strict=True):
            x[name] = x[name] - direction.numpy()
    return {name: digest_of(value) for name, value in x.items()}


def mean_over_ranks():
    x = torch.nn.Parameter(torch.zeros(40, 50))
    optimizer = ef.DistributedOptimizer(
        torch.optim.SGD([x], lr=1.0), [("x", x)], compression=ef.ErrorFeedback(ef.Identity()),
        exchange="hierarchical",
    )  # fmt: skip
    (x * float(hvd.rank())).sum().backward()
    optimizer.step()
    return float((x.detach() + (hvd.size() - 1) / 2).abs().max())


def refused():
    model = build_model()
    errors = [error_of(lambda: wrap("ef", model, ef.PowerSGD(rank=2)))]
    other = "gather" if hvd.rank() == 1 else "hierarchical"

    def disagree():
        train(model, wrap("ef", model, exchange=other), batches(0), 1)

    return [*errors, error_of(disagree)]


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
    every_method, trainings, not_finite, resumed, as_in_one_process, mean_over_ranks, refused,
    missing_rank,
)  # fmt: skip


def main() -> None:
    fixed = None
    if "pretend" in ARGUMENTS:
        pretend(hvd, 2)
    else:  # over MPI, Horovod starts once
        hvd.init()
        fixed = error_of(lambda: wrap("ef", build_model()))
        hvd.shutdown()
    hvd.init(process_sets="dynamic")
    found = {scenario.__name__: scenario() for scenario in SCENARIOS}
    report(hvd.rank(), {**found, "fixed": fixed, "arguments": ARGUMENTS})


main()
