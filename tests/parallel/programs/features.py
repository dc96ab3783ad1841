"""What real training loops do, with `ef.DistributedOptimizer`; facts for the tests to judge."""

from __future__ import annotations

import gc
import io
import weakref

import horovod.torch as hvd
import torch
from common import OUT, error_of, report
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch_common import batches, build_model, digest, flat, train

import ef_horovod.torch as ef

METHOD = ef.EF21(ef.TopK(ratio=0.05), momentum=0.5)
cross_entropy = torch.nn.functional.cross_entropy


def wrapped(model, method=METHOD, lr=0.05, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return ef.DistributedOptimizer(
        optimizer, model.named_parameters(), compression=method, **options
    )


def accumulation():
    """Two half batches with backward_passes_per_step=2 against one whole batch."""
    ends = []
    for passes in (1, 2):
        model, next_batch = build_model(), batches(hvd.rank())
        optimizer = wrapped(model, ef.ErrorFeedback(ef.Identity()), backward_passes_per_step=passes)
        for _ in range(20):
            inputs, labels = next_batch()
            optimizer.zero_grad()
            for part in range(passes):
                rows = slice(part * 16 // passes, (part + 1) * 16 // passes)
                (cross_entropy(model(inputs[rows]), labels[rows]) / passes).backward()
            optimizer.step()
        ends.append(flat(model))
    return float((ends[0] - ends[1]).abs().max())


def too_many_passes():
    model, next_batch = build_model(), batches(hvd.rank())
    optimizer = wrapped(model)
    inputs, labels = next_batch()
    optimizer.zero_grad()
    cross_entropy(model(inputs), labels).backward()
    error = error_of(lambda: cross_entropy(model(inputs), labels).backward())
    return [error, error_of(optimizer.step)]


def clipping():
    """Clipping sees the averaged gradient: equal norms on all ranks, and it takes effect."""
    model, next_batch, norms = build_model(), batches(hvd.rank()), []
    optimizer = wrapped(model)
    for _ in range(10):
        inputs, labels = next_batch()
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(model(inputs), labels).backward()
        optimizer.synchronize()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)))
        clipped = torch.cat([p.grad.view(-1) for p in model.parameters()]).norm()
        with optimizer.skip_synchronize():
            optimizer.step()
    unsynchronized = error_of(lambda: forget_to_synchronize(model, optimizer, next_batch))
    optimizer.step()
    return {"norms": norms, "clipped": float(clipped), "unsynchronized": unsynchronized}


def forget_to_synchronize(model, optimizer, next_batch):
    inputs, labels = next_batch()
    optimizer.zero_grad()
    cross_entropy(model(inputs), labels).backward()
    early = error_of(optimizer.zero_grad)
    assert early.startswith("RuntimeError: zero_grad() was called between"), early
    with optimizer.skip_synchronize():
        optimizer.step()


def loss_scaling():
    """A GradScaler that overflows on one rank and changes its scale: as without a scaler."""
    plain_end, _, _ = scaled_training(enabled=False)
    end, scales, skipped = scaled_training(enabled=True)
    return {
        "difference": float((plain_end - end).abs().max()),
        "scales": scales,
        "skipped": skipped,
    }


def scaled_training(enabled):
    model, next_batch, scales = build_model(), batches(hvd.rank()), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=10, enabled=enabled)
    optimizer = wrapped(model, grad_scaler=scaler)
    inputs, labels = next_batch()
    overflow = enabled
    while len(scales) < 30:
        optimizer.zero_grad()
        loss = scaler.scale(cross_entropy(model(inputs), labels))
        if overflow and len(scales) == 5 and hvd.rank() == 1:
            loss = loss * 1e38 * 1e38
        overflow = overflow and len(scales) < 5
        loss.backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        if not optimizer.step_skipped:
            scales.append(scaler.get_scale())
            inputs, labels = next_batch()
    return flat(model), scales, optimizer.stats()[-1].skipped


def checkpoint():
    """Stop after 10 of 20 steps, go on in new objects: the same parameters to the last bit."""
    whole_model, next_batch = build_model(), batches(hvd.rank())
    whole = wrapped(whole_model, bucket_bytes=10_000)
    train(whole_model, whole, next_batch, 10)
    file = io.BytesIO()
    saved = {
        "model": whole_model.state_dict(),
        "optimizer": whole.state_dict(),
        "compression": whole.checkpoint(),  # without servers the same as compression_state_dict()
    }
    torch.save(saved, file)
    train(whole_model, whole, next_batch, 10)

    file.seek(0)
    loaded = torch.load(file)
    model, next_batch = build_model(seed=5), batches(hvd.rank())
    for _ in range(10):
        next_batch()
    model.load_state_dict(loaded["model"])
    again = wrapped(model, bucket_bytes=10_000)
    again.load_state_dict(loaded["optimizer"])
    again.load_compression_state_dict(loaded["compression"])
    train(model, again, next_batch, 10)
    assert again.rounds == whole.rounds == 20

    lost = wrapped(build_model(), ef.ErrorFeedback(ef.OneBit()))
    other = dict(loaded["compression"], rank=99)
    return {
        "whole": digest(whole_model),
        "again": digest(model),
        "method": error_of(lambda: lost.load_compression_state_dict(loaded["compression"])),
        "rank": error_of(lambda: again.load_compression_state_dict(other)),
    }


def unused_parameters():
    """A layer that only some ranks use in a step, and one that is unfrozen too late."""
    model = build_model()
    for parameter in model[3].parameters():
        parameter.requires_grad_(False)
    optimizer = wrapped(model)
    next_batch = batches(hvd.rank())
    for step in range(6):
        inputs, _ = next_batch()
        optimizer.zero_grad()
        hidden = model[0](inputs)
        if step % hvd.size() == hvd.rank():
            hidden = hidden @ model[2].weight.T @ model[2].weight
        hidden.square().mean().backward()
        optimizer.step()
    end = digest(model)
    model[3].weight.requires_grad_(True)
    return {"end": end, "unfrozen": error_of(lambda: train(model, optimizer, next_batch, 1))}


def sparse_gradients():
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = torch.nn.EmbeddingBag(500, 8, sparse=sparse)
        optimizer = wrapped(model, ef.ErrorFeedback(ef.TopK(ratio=0.1)), sparse_as_dense=True)
        generator = torch.Generator().manual_seed(hvd.rank())
        for _ in range(10):
            words = torch.randint(0, 500, (4, 6), generator=generator)
            optimizer.zero_grad()
            model(words).square().sum().backward()
            optimizer.step()
        ends.append(flat(model))
    moved = float((ends[0] - torch.nn.EmbeddingBag(500, 8).weight.detach().view(-1)).norm())
    return {
        "difference": float((ends[0] - ends[1]).abs().max()),
        "moved": moved,
        "end": ends[1].sum().item(),
    }


def restored_on_one_rank():
    """Horovod's recipe: rank 0 restores the optimizer's state, then it is broadcast."""
    model = build_model(seed=hvd.rank())
    plain = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if hvd.rank() == 0:
        cross_entropy(model(torch.ones(1, 40)), torch.tensor([1])).backward()
        plain.step()
    optimizer = ef.DistributedOptimizer(plain, model.named_parameters(), compression=METHOD)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    train(model, optimizer, batches(hvd.rank()), 5)
    return {"end": digest(model), "is_sgd": isinstance(optimizer, torch.optim.SGD)}


def hooks_in_another_order():
    """Two stock optimizers whose backward passes the ranks run the other way round."""
    models = [build_model(seed) for seed in (0, 1)]
    optimizers = [stock(model, f"{i}.", timeout=20.0) for i, model in enumerate(models)]
    inputs, labels = batches(hvd.rank())()
    for _ in range(2):
        for model in models if hvd.rank() == 0 else models[::-1]:
            model.zero_grad()
            cross_entropy(model(inputs), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
    return [digest(model) for model in models]


def hooks_of_dropped_steps():
    """How many process-wide hooks there are after a dropped, a good and a last dropped step."""
    model, counts = build_model(), []
    optimizer = stock(model)
    for factor in (float("nan"), 1.0, float("nan")):
        inputs, labels = batches(hvd.rank())()
        model.zero_grad()
        (cross_entropy(model(inputs), labels) * factor).backward()
        optimizer.step()
        counts.append(len(_global_optimizer_pre_hooks))
    compression = weakref.ref(optimizer._compression)
    del optimizer
    gc.collect()
    assert compression() is None, "the hook keeps it alive"
    return [*counts, len(_global_optimizer_pre_hooks)]


def stock(model, prefix="", **options):
    named = [(prefix + name, parameter) for name, parameter in model.named_parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return hvd.DistributedOptimizer(
        optimizer, named, compression=ef.Compression(METHOD, named, **options)
    )


def refused():
    model = build_model()
    optimizer = wrapped(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    return {
        "adasum": error_of(lambda: wrapped(build_model(), op=hvd.Adasum)),
        "groups": error_of(lambda: wrapped(build_model(), groups=2)),
        "predivide": error_of(lambda: wrapped(build_model(), gradient_predivide_factor=2.0)),
        "compressor": error_of(lambda: wrapped(build_model(), ef.TopK(ratio=0.1))),
        "horovod's": error_of(lambda: wrapped(build_model(), hvd.Compression.fp16)),
        "twice": error_of(lambda: ef.DistributedOptimizer(optimizer, compression=METHOD)),
        "unnamed": error_of(lambda: ef.DistributedOptimizer(sgd, [], compression=METHOD)),
        "reduce": error_of(lambda: wrapped(build_model(), exchange="reduce")),
        "new group": error_of(lambda: optimizer.add_param_group({"params": [torch.ones(1)]})),
        "lbfgs": error_of(lambda: ef.DistributedOptimizer(torch.optim.LBFGS(model.parameters()))),
    }


def statistics():
    model = build_model()
    optimizer = wrapped(model, ef.ErrorFeedback(ef.TopK(ratio=0.01)))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, batches(hvd.rank()), 4)
    scheduler.step()
    rows = {row.name: row for row in optimizer.stats()}
    bucket = rows["bucket.0"]
    return {
        "names": sorted(rows),
        "elements": bucket.num_elements,
        "bytes": [bucket.bytes_out, bucket.bytes_in, bucket.dense_bytes_out],
        "payload": ef.TopK(ratio=0.01).nbytes(bucket.num_elements),
        "error": bucket.relative_error,
        "seconds": [bucket.seconds_compress, bucket.seconds_wait, bucket.seconds_decompress],
        "lr": optimizer.param_groups[0]["lr"],
    }


def training_log():
    """A log beside a training that is interrupted after 5 of 8 steps, and what `stats()` says."""
    path, sent = OUT / "log.jsonl", []
    model, next_batch = build_model(), batches(hvd.rank())
    state = None
    for steps in (5, 3):
        optimizer = wrapped(model, ef.ErrorFeedback(ef.TopK(ratio=0.1)))
        if state is not None:
            optimizer.load_compression_state_dict(state)
        log = ef.TrainingLog(path, optimizer, every=2, tensorboard=OUT / "events")
        for _ in range(steps):
            train(model, optimizer, next_batch, 1)
            log.step(loss := torch.tensor(1.5, requires_grad=True))
        log.close()
        assert loss.requires_grad
        state = optimizer.compression_state_dict()
        sent.append([optimizer.stats()[-1].bytes_out, optimizer.stats()[-1].bytes_in])
        optimizer.unwrap()
    errors = {n: float(v["worker.error"].norm()) for n, v in state["parameters"].items()}
    events = EventAccumulator(str(OUT / "events")).Reload() if hvd.rank() == 0 else None
    return {
        "sent": sent,
        "errors": errors,
        "names": [name for name, _ in model.named_parameters()],
        "losses": [event.value for event in events.Scalars("ef/loss")] if events else [],
        "stock": stock_log(),
    }


def stock_log():
    """The same with `ef.Compression`, each rank in its own file."""
    model, next_batch = build_model(), batches(hvd.rank())
    compression = ef.Compression(METHOD, model.named_parameters())
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters(), compression=compression)
    log = ef.TrainingLog(OUT / "stock{rank}.jsonl", compression, every=3)
    for _ in range(3):
        train(model, optimizer, next_batch, 1)
        log.step()
    return compression.stats()[-1].bytes_out


def main() -> None:
    hvd.init()
    scenarios = (
        accumulation, too_many_passes, clipping, loss_scaling, checkpoint, unused_parameters,
        sparse_gradients, restored_on_one_rank, hooks_in_another_order, hooks_of_dropped_steps,
        refused, statistics, training_log,
    )  # fmt: skip
    report(hvd.rank(), {scenario.__name__: scenario() for scenario in scenarios})


main()
