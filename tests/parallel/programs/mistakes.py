"""What people do by mistake, or nearly; facts for the tests to judge."""

from __future__ import annotations

import gc
import os

import horovod.torch as hvd
import torch
from common import error_of, report
from torch_common import batches, build_model, digest, train

import ef_horovod.torch as ef

METHOD = ef.ErrorFeedback(ef.OneBit())
cross_entropy = torch.nn.functional.cross_entropy


def wrapped(model, method=METHOD, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return ef.DistributedOptimizer(
        optimizer, model.named_parameters(), compression=method, **options
    )


def backward(model):
    inputs, labels = batches(hvd.rank())()
    cross_entropy(model(inputs), labels).backward()


def joining():
    """Refused beside anything that averages with compression, and as always without it."""
    model = build_model()
    optimizer = wrapped(model)
    facts = {"optimizer": error_of(hvd.join)}
    optimizer.unwrap()
    adapter = ef.Compression(METHOD, model.named_parameters())
    facts["adapter"] = error_of(hvd.join)
    del adapter
    facts["last"] = hvd.join()
    return facts


def clipping_too_early():
    model = build_model()
    optimizer = wrapped(model)
    train(model, optimizer, batches(hvd.rank()), 1)
    optimizer.zero_grad()
    backward(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    return error_of(optimizer.step)


def freezing_and_wrapping_again():
    model = build_model()
    optimizer = wrapped(model)
    train(model, optimizer, batches(hvd.rank()), 2)
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    refused = error_of(lambda: train(model, optimizer, batches(hvd.rank()), 1))
    taken = error_of(lambda: wrapped(model))
    optimizer.unwrap()
    train(model, wrapped(model), batches(hvd.rank()), 2)  # the new one is forgotten at once
    gc.collect()
    train(model, wrapped(model), batches(hvd.rank()), 2)
    still = bool(torch.equal(frozen, model[0].weight))
    return {"refused": refused, "taken": taken, "still": still, "end": digest(model)}


def strange_parameters():
    tied = torch.nn.Linear(50, 50)
    twice = [("a", tied.weight), ("b", tied.weight), ("c", tied.bias)]
    spectral = torch.nn.Parameter(torch.zeros(40, 40, dtype=torch.complex64))
    sgd = torch.optim.SGD(tied.parameters(), lr=0.1)
    complex_sgd = torch.optim.SGD([spectral], lr=0.1)
    return {
        "tied": error_of(lambda: ef.DistributedOptimizer(sgd, twice, compression=METHOD)),
        "tied, stock": error_of(lambda: ef.Compression(METHOD, twice)),
        "complex": error_of(lambda: ef.DistributedOptimizer(complex_sgd, [("s", spectral)])),
        "complex, stock": error_of(lambda: ef.Compression(METHOD, [("s", spectral)])),
    }


def slips():
    """What is passed in the wrong place or form; '' where it is taken all the same."""
    model = torch.nn.Linear(64, 64)
    named = model.named_parameters

    def sgd():
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def ours(*arguments, **options):
        ef.DistributedOptimizer(*arguments, **options).unwrap()

    def stock(compression):
        model = torch.nn.Linear(64, 64)  # whose hooks the failed optimizer keeps
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = hvd.DistributedOptimizer(
            plain, model.named_parameters(), compression=compression
        )
        model(torch.ones(8, 64)).sum().backward()
        optimizer.step()

    def estimate_of(loss):
        method = ef.ErrorCompensatedX(ef.OneBit(), server_compressor=ef.OneBit(), alpha=0.5)
        optimizer = ef.DistributedOptimizer(sgd(), named(), method)
        try:
            ef.EstimatedGradient(ef.STORM(0.5), optimizer).backward(loss)
        finally:
            optimizer.unwrap()

    actions = {
        "parameters": lambda: ours(sgd(), model.parameters(), compression=METHOD),
        "one parameter": lambda: ours(sgd(), model.weight, compression=METHOD),
        "not called": lambda: ours(sgd(), named, compression=METHOD),
        "method second": lambda: ours(sgd(), METHOD),
        "model first": lambda: ours(model, named(), compression=METHOD),
        "dict": lambda: ours(sgd(), dict(named()), compression=METHOD),
        "model": lambda: ours(sgd(), model, compression=METHOD),
        "state dict": lambda: ours(sgd(), model.state_dict(), compression=METHOD),
        "adapter, swapped": lambda: ef.Compression(named(), METHOD),
        "adapter, parameters": lambda: ef.Compression(METHOD, model.parameters()),
        "adapter, alone": lambda: ef.Compression(METHOD),
        "adapter, model": lambda: ef.Compression(METHOD, model),
        "stock, method": lambda: stock(METHOD),
        "stock, compressor": lambda: stock(ef.OneBit()),
        "estimator, swapped": lambda: ef.EstimatedGradient(sgd(), ef.STORM(0.5)),
        "estimator, loss": lambda: estimate_of(model(torch.ones(8, 64)).sum()),
    }
    return {slip: error_of(action) for slip, action in actions.items()}


def synchronizing_twice():
    model = build_model()
    optimizer = wrapped(model)
    backward(model)
    optimizer.synchronize()
    once = model[0].weight.grad.clone()
    optimizer.synchronize()
    return bool(torch.equal(once, model[0].weight.grad))


def an_epoch_that_ends_within_an_accumulation():
    model = build_model()
    optimizer = wrapped(model, backward_passes_per_step=2)
    backward(model)
    optimizer.zero_grad()
    backward(model)
    backward(model)
    late = error_of(lambda: optimizer.set_backward_passes_per_step(1))
    optimizer.step()
    return {"steps": optimizer.stats()[-1].steps, "late": late}


def loading_a_state():
    """Step hooks run once, and schedulers made before the wrapping go on, after a load too."""
    model = build_model()
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(plain, 1, gamma=0.5)
    optimizer = ef.DistributedOptimizer(plain, model.named_parameters(), compression=METHOD)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(model, optimizer, batches(hvd.rank()), 1)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, batches(hvd.rank()), 1)
    scheduler.step()
    return {"calls": len(calls), "lr": optimizer.param_groups[0]["lr"]}


def closure():
    model = build_model()
    optimizer = wrapped(model)
    next_batch, losses = batches(hvd.rank()), []
    inputs, labels = next_batch()

    def evaluate():
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    for _ in range(20):
        losses.append(float(optimizer.step(evaluate).detach()))
    return {"first": losses[0], "last": losses[-1], "end": digest(model)}


def two_optimizers():
    """A loss that goes through another optimizer's parameters, frozen meanwhile, as in a GAN."""
    generator, discriminator = build_model(), torch.nn.Linear(10, 120)
    own, other = wrapped(generator), wrapped(discriminator)
    next_batch = batches(hvd.rank())
    for _ in range(4):
        inputs, _ = next_batch()
        own.zero_grad()
        discriminator.requires_grad_(False)
        discriminator(generator(inputs)).square().mean().backward()
        own.step()
        discriminator.requires_grad_(True)
        other.zero_grad()
        discriminator(generator(inputs).detach()).sub(1).square().mean().backward()
        other.step()
    return digest(generator) + digest(discriminator)


def stock_checkpoint():
    """`ef.Compression`'s memories: stop after 5 of 10 steps, go on in new objects."""

    def stock(model):
        adapter = ef.Compression(METHOD, model.named_parameters())
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        return adapter, hvd.DistributedOptimizer(sgd, model.named_parameters(), compression=adapter)

    whole, next_batch = build_model(), batches(hvd.rank())
    adapter, optimizer = stock(whole)
    train(whole, optimizer, next_batch, 5)
    again = build_model(seed=9)
    again.load_state_dict(whole.state_dict())
    resumed, resumed_optimizer = stock(again)
    resumed.load_state_dict(adapter.state_dict())
    train(whole, optimizer, next_batch, 5)
    next_batch = batches(hvd.rank())
    for _ in range(5):
        next_batch()
    train(again, resumed_optimizer, next_batch, 5)
    return {"whole": digest(whole), "again": digest(again)}


def elastic():
    os.environ["HOROVOD_ELASTIC"] = "1"
    model, sgd = build_model(), torch.optim.SGD
    named = list(model.named_parameters())

    def wrapped_for_updates():
        ef.CompressedUpdates(sgd(model.parameters(), lr=0.1), named, compression=METHOD)

    def wrapped_by(method=METHOD, **options):
        inner = sgd(model.parameters(), lr=0.1)
        return error_of(
            lambda: ef.DistributedOptimizer(inner, named, compression=method, **options)
        )

    return {
        "refused": [error_of(lambda: ef.Compression(METHOD, named)), error_of(wrapped_for_updates)],
        "fixed": [
            wrapped_by(exchange="hierarchical"),
            wrapped_by(exchange="auto:1gbit"),
            wrapped_by(process_set=hvd.global_process_set),
        ],
        "weights": wrapped_by(ef.EF21(ef.TopK(k=3), weights=(1.0, 2.0))),
    }


def main() -> None:
    hvd.init()
    scenarios = (
        joining, clipping_too_early, freezing_and_wrapping_again, strange_parameters, slips,
        synchronizing_twice,
        an_epoch_that_ends_within_an_accumulation, loading_a_state, closure, two_optimizers,
        stock_checkpoint, elastic,
    )  # fmt: skip
    report(hvd.rank(), {scenario.__name__: scenario() for scenario in scenarios})


main()
