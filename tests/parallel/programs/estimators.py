"""STORM, IGT and PAGE in a training loop, on two ranks, against the same in one process."""

from __future__ import annotations

import io
from dataclasses import replace

import horovod.torch as hvd
import numpy as np
import torch
from common import error_of, report

import ef_horovod.torch as ef

STEPS, LR, ROWS, INPUTS, OUTPUTS = 40, 0.1, 24, 40, 30
ALPHA = ef.Decay(2 / 3, offset=4)
ONE_BIT, HALF = ef.OneBit(), ef.TopK(ratio=0.5)
CASES = {
    "STORM": (ef.STORM(ALPHA), ef.ErrorCompensatedX(ONE_BIT, server_compressor=HALF, alpha=ALPHA)),
    "ROOT-SGD": (
        ef.ROOTSGD(),
        ef.ErrorCompensatedX(HALF, server_compressor=HALF, alpha=ef.Decay(1.0)),
    ),
    "IGT": (ef.IGT(0.3), ef.ErrorCompensatedX(HALF, server_compressor=ONE_BIT, alpha=0.3)),
    "PAGE": (ef.PAGE(0.25), ef.EF21(ef.TopK(ratio=0.1))),
    "plain": (ef.Estimator(), ef.ErrorCompensatedX(HALF, alpha=0.3)),
}


def data(worker, estimator, step):
    """(inputs, targets) of a step: a batch, or all of them where the estimator asks for it."""
    rng = np.random.default_rng(worker)
    inputs = rng.normal(size=(ROWS, INPUTS)).astype(np.float32)
    targets = rng.normal(size=(ROWS, OUTPUTS)).astype(np.float32)
    rows = np.random.default_rng([worker, step]).choice(ROWS, 4, replace=False)
    if getattr(estimator, "whole", lambda _: False)(step):
        rows = slice(None)
    return inputs[rows], targets[rows]


def simulated(estimator, method):
    """The same in one process."""

    def gradient(worker, weights, step):
        inputs, targets = map(torch.from_numpy, data(worker, estimator, step))
        weights = weights.clone().requires_grad_()
        outputs = torch.nn.functional.linear(inputs, weights)
        loss = torch.nn.functional.mse_loss(outputs, targets)
        return torch.autograd.grad(loss, weights)[0]

    run = ef.simulate(
        method,
        gradient,
        torch.full((OUTPUTS, INPUTS), 0.1),
        workers=hvd.size(),
        steps=STEPS,
        step_size=LR,
        estimator=estimator,
    )
    return run.x


def start(estimator, method, bias=False, **options):
    model = torch.nn.Linear(INPUTS, OUTPUTS, bias=bias)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    optimizer = ef.DistributedOptimizer(
        sgd, model.named_parameters(), compression=method, **options
    )
    return model, optimizer, ef.EstimatedGradient(estimator, optimizer)


def train(model, optimizer, estimate, steps, *, spoil=None):
    """`spoil`: a step that rank 1 first gets wrong, so that all ranks drop it and take it again."""
    losses = []
    while len(losses) < len(steps):
        step = steps[len(losses)]
        inputs, targets = map(torch.from_numpy, data(hvd.rank(), estimate.estimator, step))
        factor = float("nan") if step == spoil and hvd.rank() == 1 else 1.0
        optimizer.zero_grad()
        loss = estimate.backward(
            lambda x=inputs, y=targets, f=factor: f * torch.nn.functional.mse_loss(model(x), y)
        )
        optimizer.step()
        if optimizer.step_skipped:
            spoil = None
        else:
            losses.append(float(loss))
    return losses


def weights(model):
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def case(name):
    estimator, method = CASES[name]
    model, optimizer, estimate = start(estimator, method)
    losses = train(model, optimizer, estimate, range(STEPS))
    whole = simulated(estimator, method)
    again, optimizer, estimate = start(estimator, method)
    train(again, optimizer, estimate, range(STEPS), spoil=17)
    return {
        "end": weights(model).numpy().tobytes().hex()[:400],
        "difference": float((model.weight.detach() - whole).abs().max() / whole.abs().max()),
        "moved": float((whole - 0.1).abs().max()),
        "dropped": torch.equal(weights(model), weights(again)),
        "skipped": optimizer.stats()[-1].skipped,
        "resumed": torch.equal(weights(model), resumed(estimator, method)),
        "losses": losses,
    }


def resumed(estimator, method):
    """Half of the run, a checkpoint, the other half in new objects."""
    model, optimizer, estimate = start(estimator, method)
    train(model, optimizer, estimate, range(STEPS // 2))
    file = io.BytesIO()
    held = (model.state_dict(), optimizer.compression_state_dict(), estimate.state_dict())
    torch.save(held, file)
    file.seek(0)
    parameters, memories, points = torch.load(file)
    model, optimizer, estimate = start(estimator, method)
    model.load_state_dict(parameters)
    optimizer.load_compression_state_dict(memories)
    estimate.load_state_dict(points)
    train(model, optimizer, estimate, range(STEPS // 2, STEPS))
    return weights(model)


def dense_parameters():
    """A bias that stays uncompressed against one that goes through the method with Identity.

    Its gradients do not depend on the weights, for the inputs are zero.
    """
    ends = []
    for compressor, options in (
        (ef.Identity(), {"dense": lambda name, parameter: False}),
        (ef.TopK(ratio=0.5), {}),
    ):
        method = ef.ErrorCompensatedX(compressor, alpha=ALPHA)
        model, optimizer, estimate = start(ef.STORM(ALPHA), method, bias=True, **options)
        for step in range(STEPS):
            inputs, targets = data(hvd.rank(), estimate.estimator, step)
            x, y = torch.from_numpy(inputs) * 0, torch.from_numpy(targets)
            optimizer.zero_grad()
            estimate.backward(lambda m=model, x=x, y=y: torch.nn.functional.mse_loss(m(x), y))
            optimizer.step()
        ends.append(model.bias.detach())
    moved = float((ends[0] - 0.1).abs().max())
    return {"difference": float((ends[0] - ends[1]).abs().max()), "moved": moved}


def refused():
    estimator, method = CASES["STORM"]
    page, ef21 = CASES["PAGE"]
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    return {
        "plain": error_of(lambda: ef.EstimatedGradient(estimator, sgd)),
        "alpha": error_of(lambda: start(estimator, replace(method, alpha=0.1))),
        "passes": error_of(lambda: start(page, ef21, backward_passes_per_step=2)),
    }


def dropout():
    """Both points of a step see the same dropout: with equal points the gradients are equal."""
    estimator, method = CASES["STORM"]
    model, optimizer, estimate = start(estimator, method)
    seen = []
    for step in range(3):
        inputs, targets = map(torch.from_numpy, data(hvd.rank(), estimator, step))

        def loss(x=inputs, y=targets):
            mask = torch.nn.functional.dropout(torch.ones_like(x))
            seen.append(mask)
            return torch.nn.functional.mse_loss(model(x * mask), y)

        optimizer.zero_grad()
        estimate.backward(loss)
        optimizer.step()
    first, *pairs = seen
    return {
        "calls": len(seen),
        "same": all(torch.equal(a, b) for a, b in zip(pairs[::2], pairs[1::2], strict=True)),
        "fresh": not torch.equal(first, pairs[0]) and not torch.equal(pairs[0], pairs[2]),
    }


def main() -> None:
    torch.manual_seed(0)
    hvd.init()
    result = {name: case(name) for name in CASES}
    result |= {scenario.__name__: scenario() for scenario in (dense_parameters, refused, dropout)}
    report(hvd.rank(), result)


main()
