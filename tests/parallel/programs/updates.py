"""CompressedUpdates on real ranks of PyTorch."""

from __future__ import annotations

import copy
import json
import warnings

import horovod.torch as hvd
import torch
from common import OUT, error_of, report
from given_updates import CASES, SETTINGS, SHAPES, STEPS, gradients_of
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
    for name, local_steps in CASES:
        kind, _ = OPTIMIZERS[name]
        named = [(str(i), torch.nn.Parameter(torch.zeros(shape))) for i, shape in enumerate(SHAPES)]
        inner = kind([p for _, p in named], **SETTINGS[name])
        optimizer = ef.CompressedUpdates(inner, named, SIGNS, local_steps=local_steps)
        for step in range(STEPS):
            for (_, p), gradient in zip(named, gradients_of(hvd.rank(), step), strict=True):
                p.grad = torch.from_numpy(gradient)
            optimizer.step()
        optimizer.exchange()
        facts[f"{name} {local_steps}"] = {
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
    other.load_compression_state_dict(copy.deepcopy(optimizer.checkpoint()))
    rest = [next_batch() for _ in range(6)]
    for model, one in ((whole, optimizer), (again, other)):
        left = iter(rest)
        train(model, one, lambda left=left: next(left), 6)
    return {"whole": digest(whole), "again": digest(again)}


def scheduled():
    """A schedule made before or after the wrapping, and what torch warns of."""
    facts = {}
    for when in ("before", "after"):
        model, next_batch = build_model(), batches(hvd.rank())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if when == "before":
                scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            optimizer = ef.CompressedUpdates(optimizer, model.named_parameters(), SIGNS)
            if when == "after":
                scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            for _ in range(3):
                train(model, optimizer, next_batch, 1)
                scheduler.step()
        facts[when] = {
            "lr": optimizer.param_groups[0]["lr"],
            "model": digest(model),
            "warnings": [str(one.message) for one in caught],
        }
    return facts


def called():
    """Steps of a closure, of Horovod's recipe for clipping, and plain ones; and their hooks."""
    facts = {}
    for way in ("plain", "closure", "horovod"):
        model, next_batch = build_model(), batches(hvd.rank())
        optimizer = updates(model, "AdamW", backward_passes_per_step=2, op=hvd.Average)
        hooks, seen, losses = [], [], []
        optimizer.register_step_pre_hook(lambda *_, hooks=hooks: hooks.append("pre"))
        optimizer.register_step_post_hook(
            lambda *_, model=model, seen=seen: seen.append(digest(model))
        )
        for _ in range(3):
            inputs, labels = next_batch()

            def closure(model=model, optimizer=optimizer, inputs=inputs, labels=labels):
                optimizer.zero_grad()
                loss = cross_entropy(model(inputs), labels)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                return loss

            if way == "closure":
                losses.append(float(optimizer.step(closure)))
                continue
            losses.append(float(closure()))
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                assert optimizer.step() is None
        seen_before = len(seen)
        optimizer.zero_grad()
        model[0].weight.grad = torch.full_like(model[0].weight, torch.nan)
        optimizer.step()  # left out, if there are several ranks
        facts[way] = {
            "losses": losses,
            "seen": seen[:3],
            "hooks": [len(hooks), seen_before, len(seen)],
            "is": isinstance(optimizer, torch.optim.AdamW),
        }
    return facts


def scaled():
    """Overflows on the last rank under a GradScaler; the other steps are those without a scaler."""
    facts, batch = {}, batches(hvd.rank())()
    for unscaling in (False, True):
        ends, skipped, scale = [], [], None
        for enabled in (True, False):
            model = build_model()
            optimizer = updates(model, "AdamW")
            scaler = torch.amp.GradScaler("cpu", 2.0**10, growth_interval=1000, enabled=enabled)
            for step in range(8):
                if not enabled and step in (0, 5):
                    continue
                optimizer.zero_grad()
                scaler.scale(cross_entropy(model(batch[0]), batch[1])).backward()
                if enabled and step in (0, 5) and hvd.rank() == hvd.size() - 1:
                    model[0].weight.grad[0, 0] = torch.inf
                if unscaling:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                scaler.step(optimizer)
                scaler.update()
                if optimizer.step_skipped:
                    skipped.append(step)
            scale = scale or scaler.get_scale()
            ends.append(digest(model))
        facts["unscaled by the user" if unscaling else "plain"] = {
            "ends": ends, "skipped": skipped, "scale": scale,
        }  # fmt: skip
    return facts


def handled():
    """Broadcasts of the state, a log, sparse gradients, unwrapping, and a copy."""
    model, next_batch = build_model(), batches(hvd.rank())
    optimizer = updates(model, "AdamW")
    before = digest(model)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)  # makes the state
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    path = OUT / f"log-{hvd.rank()}.jsonl"
    log = ef.TrainingLog(path, optimizer, every=1)
    train(model, optimizer, next_batch, 2)
    log.step(1.0)
    log.close()
    moments = [float(optimizer.state[model[0].weight]["exp_avg"].abs().sum())]
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    moments.append(float(optimizer.state[model[0].weight]["exp_avg"].abs().sum()))
    duplicate = copy.deepcopy(optimizer)
    copied = error_of(duplicate.step)
    optimizer.discard()
    optimizer.set_backward_passes_per_step(3)
    cleared = all(p.grad is None for p in model.parameters())
    optimizer.unwrap()
    unwrapped = type(optimizer) is torch.optim.AdamW
    optimizer = ef.CompressedUpdates(optimizer, model.named_parameters(), SIGNS)
    train(model, optimizer, next_batch, 2)
    table = torch.nn.Embedding(300, 8, sparse=True)
    adam = torch.optim.Adam(table.parameters(), lr=0.1)
    adam = ef.CompressedUpdates(adam, table.named_parameters(), SIGNS, sparse_as_dense=True)
    hvd.broadcast_parameters(table.state_dict(), root_rank=0)
    if hvd.size() > 1:
        table(torch.tensor([1, 2])).sum().backward()
        adam.step()
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {
        "moments": moments,
        "copied": copied,
        "cleared": cleared,
        "unwrapped": unwrapped,
        "moved": before != digest(model),
        "end": digest(model),
        "table": digest(table),
        "log": [line.get("step") for line in lines],
    }


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
    of_gradients = other.compression_state_dict() if hvd.size() > 1 else {}
    twice = error_of(lambda: updates(taken, "SGD"))
    frozen, thawed = build_model(), build_model()
    freezing = updates(frozen, "SGD")
    frozen[0].requires_grad_(False)
    thawed[0].requires_grad_(False)
    thawing = updates(thawed, "SGD")
    thawed[0].requires_grad_(True)
    if hvd.size() > 1:
        other.unwrap()
    wrapped = updates(taken, "SGD")
    scaled = updates(build_model(), "SGD")
    scaled.found_inf, scaled.grad_scale = torch.zeros(()), torch.ones(())
    return {
        "twice": twice,
        "again": error_of(lambda: updates(taken, "SGD")),
        "wrapped": error_of(lambda: ef.CompressedUpdates(wrapped, None, SIGNS)),
        "inside": error_of(lambda: ef.DistributedOptimizer(wrapped, compression=SIGNS)),
        "by horovod": error_of(lambda: hvd.DistributedOptimizer(wrapped)),
        "group": error_of(lambda: wrapped.add_param_group({"params": [torch.ones(1)]})),
        "scaler": error_of(scaled.step),
        "op": make(op=hvd.Sum),
        "adasum": make(op=hvd.Adasum),
        "groups": make(num_groups=2),
        "predivide": make(gradient_predivide_factor=2.0),
        "passes": make(backward_passes_per_step=0),
        "rows": make(sparse_as_dense=2),
        "none": make(None),
        "adapter": make(hvd.Compression.fp16),
        "momentum": make(ef.MomentumCorrection(ef.OneBit())),
        "adam": make(ef.FrozenAdam(ef.OneBit()), dense_steps=3),
        "server": make(exchange="server"),
        "frozen": error_of(lambda: train(frozen, freezing, batches(hvd.rank()), 1)),
        "thawed": error_of(lambda: train(thawed, thawing, batches(hvd.rank()), 1)),
        "gradients": error_of(lambda: wrapped.load_compression_state_dict(of_gradients)),
        "state": error_of(lambda: wrapped.load_compression_state_dict({"a": 1})),
        "seed": error_of(lambda: train(model, optimizer, batches(hvd.rank()), 1)),
    }


def main() -> None:
    hvd.init()
    scenarios = (
        without_compression, compressed, of_given_gradients, spoiled, resumed, scheduled, called,
        scaled, handled, refusals,
    )  # fmt: skip
    report(hvd.rank(), {scenario.__name__: scenario() for scenario in scenarios})


main()
