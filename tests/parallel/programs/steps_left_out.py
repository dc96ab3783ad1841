"""Steps that are left out, and loss scales, in every order; facts for the tests to judge."""

from __future__ import annotations

import horovod.torch as hvd
import torch
from common import error_of, report
from torch_common import batches, build_model, digest, flat, train

import ef_horovod.torch as ef

METHODS = {
    "top-k": (ef.ErrorFeedback(ef.TopK(ratio=0.05)), "auto"),
    "one bit, slices": (
        ef.DoubleSqueeze(ef.OneBit(), server_compressor=ef.OneBit()),
        "double_pass",
    ),
    "EF21": (ef.EF21(ef.TopK(ratio=0.05)), "auto"),
    "EF21, momentum": (
        ef.EF21(ef.TopK(ratio=0.05), momentum=0.5, server_compressor=ef.TopK(0.1)),
        "auto",
    ),
    "ECX, slices": (
        ef.ErrorCompensatedX(ef.TopK(0.05), server_compressor=ef.TopK(0.05), alpha=0.5),
        "double_pass",
    ),
    "PowerSGD": (ef.PowerSGD(rank=2), "auto"),
    "random": (ef.ErrorFeedback(ef.RandomK(0.1, scale="contractive")), "reduce"),
}
cross_entropy = torch.nn.functional.cross_entropy


def wrapped(model, method=METHODS["top-k"][0], exchange="auto", **options):
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return ef.DistributedOptimizer(
        sgd, model.named_parameters(), compression=method, exchange=exchange, **options
    )


def left_out_by_zero_grad(model, optimizer):
    optimizer.synchronize()
    optimizer.zero_grad()


def left_out_by_the_model(model, optimizer):
    optimizer.synchronize()
    model.zero_grad()


def left_out_by_discard(model, optimizer):
    optimizer.synchronize()
    optimizer.discard()


def left_out_under_way(model, optimizer):
    optimizer.discard()


def left_out_after_a_change(model, optimizer):
    """A change of a gradient that is under way raises, and nothing of the step has happened."""
    model[0].weight.grad.mul_(2)
    assert "was changed between backward()" in error_of(optimizer.step)
    optimizer.discard()


def left_out_after_a_change_of_data(model, optimizer):
    """The same where the version of the tensor does not tell."""
    model[0].weight.grad.data.mul_(2)
    assert "'0.weight' was changed between backward()" in error_of(optimizer.synchronize)
    optimizer.discard()


WAYS = (
    left_out_by_zero_grad,
    left_out_by_the_model,
    left_out_by_discard,
    left_out_under_way,
    left_out_after_a_change,
    left_out_after_a_change_of_data,
)


def training(method, exchange, way=None):
    """12 steps, with spikes that are left out before the first, the third, ... of them."""
    model, next_batch = build_model(), batches(hvd.rank())
    optimizer = wrapped(model, method, exchange, bucket_bytes=10_000)
    for step in range(12):
        if way is not None and step % 2 == 0:
            inputs, labels = batches(50 + hvd.rank())()
            optimizer.zero_grad()
            (1000 * cross_entropy(model(inputs), labels)).backward()
            way(model, optimizer)
        train(model, optimizer, next_batch, 1)
    row = optimizer.stats()[-1]
    optimizer.unwrap()
    return {"end": digest(model), "steps": row.steps, "skipped": row.skipped}


def steps_left_out():
    """The end of each training with spikes, to be that of the training without."""
    found = {}
    for name, (method, exchange) in METHODS.items():
        ways = WAYS if name == "top-k" else (left_out_by_zero_grad,)
        found[name] = {"without": training(method, exchange)}
        found[name] |= {way.__name__: training(method, exchange, way) for way in ways}
    return found


def averages_in_the_next_gradient():
    """Without zero_grad() averages are a part of the next gradient, as in plain Horovod."""
    ends = []
    for wrap in (hvd.DistributedOptimizer, ef.DistributedOptimizer):
        model, next_batch = build_model(), batches(hvd.rank())
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizer = wrap(sgd, named_parameters=model.named_parameters())
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(2):
                inputs, labels = next_batch()
                cross_entropy(model(inputs), labels).backward()
                optimizer.synchronize()
            with optimizer.skip_synchronize():
                optimizer.step()
        ends.append(flat(model))
    return float((ends[0] - ends[1]).abs().max())


def by_hand(model, optimizer):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad
    optimizer.zero_grad()


def by_hand_in_the_old_way(model, optimizer):
    for parameter in model.parameters():
        parameter.data.add_(parameter.grad.data, alpha=-0.05)
        parameter.grad.data.zero_()


def by_hand_and_the_model(model, optimizer):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad
    model.zero_grad(set_to_none=False)


def by_the_optimizer_inside(model, optimizer):
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    optimizer.zero_grad()


def by_step(model, optimizer):
    with optimizer.skip_synchronize():
        optimizer.step()
    optimizer.zero_grad()


def averages_applied():
    """However averages are applied, error-feedback state goes on from there."""
    ways = by_step, by_hand, by_hand_in_the_old_way, by_hand_and_the_model, by_the_optimizer_inside
    ends = {}
    for way in ways:
        model, next_batch = build_model(), batches(hvd.rank())
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizer = ef.DistributedOptimizer(
            sgd, model.named_parameters(), compression=METHODS["top-k"][0]
        )
        for _ in range(6):
            inputs, labels = next_batch()
            cross_entropy(model(inputs), labels).backward()
            optimizer.synchronize()
            way(model, optimizer)
        ends[way.__name__] = flat(model)
        optimizer.unwrap()
    return {name: float((end - ends["by_step"]).abs().max()) for name, end in ends.items()}


def averages_changed_and_forgotten():
    model = build_model()
    optimizer = wrapped(model)
    inputs, labels = batches(hvd.rank())()
    cross_entropy(model(inputs), labels).backward()
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    return error_of(lambda: cross_entropy(model(inputs), labels).backward())


def generator_and_discriminator():
    """The generator's loss reaches the discriminator, whose step is left out."""
    torch.manual_seed(0)
    generator, discriminator = torch.nn.Linear(40, 40), torch.nn.Linear(40, 40)
    for_generator, for_discriminator = wrapped(generator), wrapped(discriminator)
    draws = torch.Generator().manual_seed(hvd.rank())
    refused = ""
    for step in range(4):
        noise = torch.randn(8, 40, generator=draws)
        for_generator.zero_grad()
        (discriminator(generator(noise)) ** 2).mean().backward()
        for_generator.step()
        if step == 2:
            refused = error_of(for_discriminator.zero_grad)
        for_discriminator.discard()
        (discriminator(generator(noise).detach()) ** 2).mean().backward()
        for_discriminator.step()
    return {"refused": refused, "end": [digest(generator), digest(discriminator)]}


def scaled_training(scaled, *, unscale=False, method=METHODS["top-k"][0], fused=False, **options):
    """30 steps by the usual recipe; rank 1 alone overflows once.

    With `backward_passes_per_step` a pass is missing in each step.
    """
    model, next_batch, scales = build_model(), batches(hvd.rank()), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=10, enabled=scaled)
    adam = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    options["compression"] = method
    if options.pop("pass_it", False):
        options["grad_scaler"] = scaler
    optimizer = ef.DistributedOptimizer(adam, model.named_parameters(), **options)
    inputs, labels = next_batch()
    overflow = scaled
    while len(scales) < 30:
        optimizer.zero_grad()
        loss = scaler.scale(cross_entropy(model(inputs), labels))
        if overflow and len(scales) == 5 and hvd.rank() == 1:
            loss = loss * 1e38 * 1e38
        overflow = overflow and len(scales) < 5
        for _ in range(max(1, options.get("backward_passes_per_step", 1) - 1)):
            loss.backward(retain_graph=True)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if not optimizer.step_skipped:
            scales.append(scaler.get_scale())
            inputs, labels = next_batch()
    end, skipped = flat(model), optimizer.stats()[-1].skipped
    optimizer.unwrap()
    return end, scales, skipped


def usual_recipe():
    found = {}
    for name, options in {
        "no argument": {},
        "unscale_": {"unscale": True},
        "grad_scaler": {"pass_it": True},
        "fused": {"fused": True},
        "fused, unscale_": {"fused": True, "unscale": True},
        "fewer passes, unscale_": {"backward_passes_per_step": 2, "unscale": True},
    }.items():
        end, scales, skipped = scaled_training(True, **options)
        plain, _, _ = scaled_training(False, **{**options, "pass_it": False})
        difference = float((end - plain).abs().max())
        found[name] = {"difference": difference, "scales": scales, "skipped": skipped}
    return found


def slips_with_a_scaler():
    """Orders that would use scaled gradients."""
    errors = {}

    def start(**options):
        model = build_model()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        if options.pop("pass_it", False):
            options["grad_scaler"] = scaler
        optimizer = wrapped(model, **options)
        inputs, labels = batches(hvd.rank())()
        scaler.scale(cross_entropy(model(inputs), labels)).backward()
        return model, scaler, optimizer

    _, scaler, optimizer = start(pass_it=True)
    errors["direct step"] = error_of(optimizer.step)
    _, scaler, optimizer = start()
    scaler.unscale_(optimizer)
    errors["unscale_, direct step"] = error_of(optimizer.step)
    _, scaler, optimizer = start()
    optimizer.synchronize()
    with optimizer.skip_synchronize():
        errors["not passed, synchronize"] = error_of(lambda: scaler.step(optimizer))
    model, scaler, optimizer = start(method=ef.NoFeedback(ef.Identity()))
    before = flat(model)
    optimizer.synchronize()
    with optimizer.skip_synchronize():
        scaler.step(optimizer)
    errors["Identity moved by"] = float((flat(model) - before).abs().max())
    model, _, optimizer = start()
    optimizer.discard()
    train(model, optimizer, batches(hvd.rank()), 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inputs, labels = batches(hvd.rank())()
    scaler.scale(cross_entropy(model(inputs), labels)).backward()
    errors["a late scaler"] = error_of(lambda: scaler.step(optimizer))
    return errors


def clipped_with_a_scaler():
    """Gradients that are changed under way, after `unscale_` too, in the first step and later."""

    def clip(model):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    def change_data(model):
        model[0].weight.grad.data.mul_(0.5)

    errors = []
    for change in (clip, change_data):
        for unscale, good_steps in ((False, 0), (False, 2), (True, 0), (True, 2)):
            model, next_batch = build_model(), batches(hvd.rank())
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            optimizer = wrapped(model)
            for step in range(good_steps + 1):
                inputs, labels = next_batch()
                optimizer.zero_grad()
                scaler.scale(cross_entropy(model(inputs), labels)).backward()
                if unscale:
                    scaler.unscale_(optimizer)
                if step < good_steps:
                    scaler.step(optimizer)
                    scaler.update()
            change(model)
            errors.append(error_of(lambda s=scaler, o=optimizer: s.step(o)))
            optimizer.unwrap()
    return errors


def stock(model, method=METHODS["top-k"][0], **options):
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    adapter = ef.Compression(method, model.named_parameters(), **options)
    return hvd.DistributedOptimizer(
        sgd, named_parameters=model.named_parameters(), compression=adapter
    )


def stock_adapter():
    """What the stock optimizer cannot leave out or take back is refused."""
    errors = {}

    def start(method, scale=1.0):
        model = build_model()
        optimizer = stock(model, method)
        inputs, labels = batches(hvd.rank())()
        (scale * cross_entropy(model(inputs), labels)).backward()
        return model, optimizer, lambda: cross_entropy(model(inputs), labels).backward()

    for name, method in (
        ("left out", METHODS["EF21"][0]),
        ("left out, no memory", ef.NoFeedback(ef.OneBit())),
    ):
        _, optimizer, again = start(method)
        optimizer.synchronize()
        optimizer.zero_grad()
        errors[name] = error_of(again)
        if not errors[name]:
            optimizer.step()
    model, optimizer, _ = start(METHODS["top-k"][0])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    errors["clipped too early"] = error_of(optimizer.step)
    model, optimizer, _ = start(METHODS["top-k"][0])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    errors["unscaled too early"] = error_of(optimizer.step)
    return errors


def stock_scaler():
    """Horovod's recipe with a scale that changes, as without a scaler."""
    ends = []
    for enabled in (False, True):
        model, next_batch = build_model(), batches(hvd.rank())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3, enabled=enabled)
        optimizer = stock(model, grad_scaler=scaler)
        for _ in range(10):
            inputs, labels = next_batch()
            optimizer.zero_grad()
            scaler.scale(cross_entropy(model(inputs), labels)).backward()
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            scaler.update()
        ends.append(flat(model))
    return float((ends[0] - ends[1]).abs().max())


def main():
    hvd.init()
    parts = (
        steps_left_out, averages_in_the_next_gradient, averages_changed_and_forgotten,
        averages_applied, generator_and_discriminator, usual_recipe, slips_with_a_scaler,
        clipped_with_a_scaler,
        stock_scaler, stock_adapter,
    )  # fmt: skip
    report(hvd.rank(), {part.__name__: part() for part in parts})


main()
