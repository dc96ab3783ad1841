"""Dense steps, a falling ratio and a policy in training loops of PyTorch; facts for the tests."""

from __future__ import annotations

from itertools import pairwise

import horovod.torch as hvd
import torch
from common import error_of, report
from torch_common import batches, build_model, digest, train

import ef_horovod.torch as ef

N = 4
TOP = ef.ErrorFeedback(ef.TopK(ratio=0.05))
CORRECTED = ef.MomentumCorrection(ef.TopK(ratio=0.05))
FALLING = ef.ErrorFeedback(ef.TopK(ratio=ef.Piecewise({0: 0.2, N: 0.05})))
POLICY = ef.by_name({"0.*": ef.EF21(ef.TopK(ratio=0.05)), "3.*": "dense"})
DENSE = ef.NoFeedback(ef.Identity())


def wrapped(model, method=TOP, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return ef.DistributedOptimizer(
        optimizer, model.named_parameters(), compression=method, **options
    )


def stock(model, method=TOP, **options):
    compression = ef.Compression(method, model.named_parameters(), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = hvd.DistributedOptimizer(
        optimizer, model.named_parameters(), compression=compression
    )
    optimizer.compression_state_dict = compression.state_dict
    optimizer.load_compression_state_dict = compression.load_state_dict
    optimizer.stats = compression.stats
    return optimizer


KINDS = {
    "top": (wrapped, {"dense_steps": N}),
    "corrected": (wrapped, {"method": CORRECTED, "dense_steps": N}),
    "adam": (wrapped, {"method": ef.FrozenAdam(ef.OneBit()), "dense_steps": N}),
    "double pass": (wrapped, {"dense_steps": N, "exchange": "double_pass"}),
    "stock": (stock, {"dense_steps": N}),
    "two methods": (wrapped, {"dense_steps": N, "dense": POLICY}),
    "two methods, stock": (stock, {"dense_steps": N, "dense": POLICY}),
    "falling ratio": (wrapped, {"method": FALLING}),
    "falling ratio, stock": (stock, {"method": FALLING}),
}


def bytes_by_step(make, options):
    """What a rank sends in each of 8 steps, and whether the ranks end equal."""
    model = build_model()
    optimizer, next_batch, sent = make(model, **options), batches(hvd.rank()), [0]
    for _ in range(8):
        train(model, optimizer, next_batch, 1)
        sent.append(optimizer.stats()[-1].bytes_out)
    return {
        "digest": digest(model),
        "sent": [b - a for a, b in pairwise(sent)],
        "methods": sorted({row.method for row in optimizer.stats()[:-1]}),
    }


def resumed(make, options, stop):
    """Stop after some of 8 steps and go on in new objects."""
    whole, next_batch = build_model(), batches(hvd.rank())
    optimizer = make(whole, **options)
    train(whole, optimizer, next_batch, stop)
    again = build_model(seed=9)
    again.load_state_dict(whole.state_dict())
    saved = optimizer.compression_state_dict()
    other = make(again, **options)
    other.load_compression_state_dict(saved)
    train(whole, optimizer, next_batch, 8 - stop)
    next_batch = batches(hvd.rank())
    for _ in range(stop):
        next_batch()
    train(again, other, next_batch, 8 - stop)
    return digest(whole), digest(again)


def as_dense():
    """The end of a run of dense steps only, and of a run without compression."""
    ends = []
    for method, steps in ((TOP, 8), (DENSE, 0)):
        model = build_model()
        train(model, wrapped(model, method, dense_steps=steps), batches(hvd.rank()), 8)
        ends.append(torch.cat([p.detach().view(-1) for p in model.parameters()]))
    return float((ends[0] - ends[1]).abs().max()), float(ends[1].abs().max())


def differs():
    model = build_model()
    return error_of(
        lambda: train(model, wrapped(model, dense_steps=hvd.rank()), batches(hvd.rank()), 1)
    )


def policy_differs():
    """Each rank gives the second method to another layer."""
    own = ef.by_name({f"{3 * hvd.rank()}.*": ef.EF21(ef.TopK(ratio=0.05))}, lambda name, p: False)
    model = build_model()
    return error_of(lambda: train(model, wrapped(model, dense=own), batches(hvd.rank()), 1))


def main() -> None:
    hvd.init()
    results = {
        "kinds": {name: bytes_by_step(*kind) for name, kind in KINDS.items()},
        "resumed": {
            f"{name} {stop}": resumed(*kind, stop)
            for name, kind in KINDS.items()
            for stop in (2, 6)
        },
        "as dense": as_dense(),
        "differs": differs(),
        "policy differs": policy_differs(),
    }
    report(hvd.rank(), results)


main()
