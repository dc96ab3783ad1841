"""CompressedUpdates on real ranks of PyTorch."""

from __future__ import annotations

import copy

import horovod.torch as hvd
import torch
from common import error_of, report
from given_updates import SETTINGS, SHAPES, STEPS, gradients_of
from torch_common import batches, build_model, digest, flat

import ef_horovod.torch as ef

cross_entropy = torch.nn.functional.cross_entropy
SIGNS = ef.ErrorFeedback(ef.OneBit())
NONE = ef.NoFeedback(ef.Identity())
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.003}),
}


def updates(model, name, method=SIGNS, **options):
    kind, settings = OPTIMIZERS[name]
    inner = kind(model.parameters(), **settings)
    return ef.CompressedUpdates(inner, model.named_parameters(), method, **options)


def train(model, optimizer, next_batch, steps, spoiled=()):
    """Steps; rank 1 has a NaN in its gradients in the spoiled ones. Returns the skipped steps."""
    skipped = []
    for step in range(steps):
        inputs, labels = next_batch()
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        if step in spoiled and hvd.rank() == hvd.size() - 1:
            next(model.parameters()).grad[0, 0] = torch.nan
        optimizer.step()
        if getattr(optimizer, "step_skipped", False):
            skipped.append(step)
    return skipped


def without_compression():
    """Largest difference from SGD with momentum on averaged gradients."""
    ends = []
    for wrapped in (False, True):
        model = build_model()
        if wrapped:
            optimizer = updates(model, "SGD", NONE)
        else:
            kind, settings = OPTIMIZERS["SGD"]
            optimizer = ef.DistributedOptimizer(
                kind(model.parameters(), **settings), model.named_parameters()
            )
        train(model, optimizer, batches(hvd.rank()), 20)
        ends.append(flat(model))
    return {"off": float((ends[0] - ends[1]).abs().max()), "moved": float(ends[0].abs().max())}


def compressed():
    facts = {}
    for name in OPTIMIZERS:
        for options in ({}, {"dense_steps": 5}, {"exchange": "gather", "bucket_bytes": 4096}):
            model = build_model()
            optimizer = updates(model, name, **options)
            train(model, optimizer, batches(hvd.rank()), 10)
            facts[f"{name} {options}"] = {
                "digest": digest(model),
                "ratio": optimizer.stats()[-1].ratio if optimizer.stats() else None,
            }
    return facts


def of_given_gradients():
    """The same gradients as in TensorFlow: where they lead, and the bytes of each bucket."""
    facts = {}
    for name, (kind, _) in OPTIMIZERS.items():
        named = [(str(i), torch.nn.Parameter(torch.zeros(shape))) for i, shape in enumerate(SHAPES)]
        inner = kind([p for _, p in named], **SETTINGS[name])
        optimizer = ef.CompressedUpdates(inner, named, SIGNS)
        for step in range(STEPS):
            for (_, p), gradient in zip(named, gradients_of(hvd.rank(), step), strict=True):
                p.grad = torch.from_numpy(gradient)
            optimizer.step()
        facts[name] = {
            "end": [x for _, p in named for x in p.detach().reshape(-1).tolist()],
            "bytes": [[row.name, row.bytes_out, row.bytes_in] for row in optimizer.stats()],
        }
    return facts


def spoiled():
    """Steps with a NaN are as if they had not been; all ranks skip them."""
    model, calm = build_model(), build_model()
    optimizer = updates(model, "AdamW")
    inputs, labels = batches(hvd.rank())()
    skipped = train(model, optimizer, lambda: (inputs, labels), 8, spoiled=(0, 5))
    train(calm, updates(calm, "AdamW"), lambda: (inputs, labels), 6)
    counted = optimizer.stats()[-1].skipped if optimizer.stats() else None
    return {"skipped": skipped, "counted": counted, "model": digest(model), "calm": digest(calm)}


def resumed():
    whole, again, next_batch = build_model(), build_model(seed=9), batches(hvd.rank())
    optimizer = updates(whole, "AdamW")
    train(whole, optimizer, next_batch, 4)
    again.load_state_dict(whole.state_dict())
    other = updates(again, "AdamW")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as from a file
    rest = [next_batch() for _ in range(6)]
    for model, one in ((whole, optimizer), (again, other)):
        left = iter(rest)
        train(model, one, lambda left=left: next(left), 6)
    return {"whole": digest(whole), "again": digest(again)}


def refusals():
    def make(method=SIGNS, **options):
        model = build_model()
        return error_of(lambda: updates(model, "SGD", method, **options))

    model = build_model()
    optimizer = updates(model, "SGD", seed=hvd.rank())
    taken = build_model()
    other = ef.DistributedOptimizer(
        torch.optim.SGD(taken.parameters(), lr=0.1), taken.named_parameters(), SIGNS
    )
    twice = error_of(lambda: updates(taken, "SGD"))
    if hvd.size() > 1:
        other.unwrap()
    return {
        "twice": twice,
        "momentum": make(ef.MomentumCorrection(ef.OneBit())),
        "adam": make(ef.FrozenAdam(ef.OneBit()), dense_steps=3),
        "server": make(exchange="server"),
        "state": error_of(lambda: updates(model, "SGD").load_state_dict({"a": 1})),
        "seed": error_of(lambda: train(model, optimizer, batches(hvd.rank()), 1)),
    }


def main() -> None:
    hvd.init()
    scenarios = (
        without_compression, compressed, of_given_gradients, spoiled, resumed, refusals,
    )  # fmt: skip
    report(hvd.rank(), {scenario.__name__: scenario() for scenario in scenarios})


main()
