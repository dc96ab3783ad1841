"""Momentum of a method beside a torch optimizer: its momentum is refused, its decay gets one."""

from __future__ import annotations

import inspect
from itertools import product

import pytest
import torch

import ef_horovod as ef
from ef_horovod.torch.momentum import DecayVelocity, require_no_momentum
from ef_horovod.training import momentum as shared

METHOD = ef.MomentumCorrection(ef.TopK(ratio=0.01), momentum=0.8)
OPTIMIZERS = {cls.__name__: cls for cls in vars(torch.optim).values() if inspect.isclass(cls)}
PLAIN = ("SGD", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Rprop", "Adafactor")
WITH_BETAS = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam")


def groups_of(name, **options):
    parameters = [torch.nn.Parameter(torch.ones(3, 3))]
    return OPTIMIZERS[name](parameters, lr=0.1, **options).param_groups


@pytest.mark.parametrize("name", PLAIN)
def test_an_optimizer_without_momentum_is_taken(name):
    require_no_momentum(groups_of(name), METHOD)


@pytest.mark.parametrize("name", WITH_BETAS)
def test_an_optimizer_with_betas_is_refused(name):
    with pytest.raises(ef.UnsupportedError, match=r"with betas=\(0.9, 0.999\) and Mom"):
        require_no_momentum(groups_of(name), METHOD)
    require_no_momentum(groups_of(name, betas=(0.0, 0.999)), METHOD)


@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_both_momenta_and_the_way_out_are_named(name):
    groups = groups_of(name) + groups_of(name, momentum=0.7)
    with pytest.raises(ef.UnsupportedError) as caught:
        require_no_momentum(groups, METHOD)
    assert str(caught.value) == (
        "got an optimizer with momentum=0.7 and MomentumCorrection(TopK(ratio=0.01), momentum=0.8) "
        "with momentum=0.8, expected momentum in one of them, because it would be applied twice; "
        "take SGD with momentum=0, or ErrorFeedback(...) to keep the optimizer's"
    )
    for other in (ef.ErrorFeedback(ef.OneBit()), ef.MomentumCorrection(ef.OneBit(), momentum=0)):
        require_no_momentum(groups, other)


FORMS = list(product([False, True], [False, True], [torch.float32, torch.float64]))


@pytest.mark.parametrize(("nesterov", "maximize", "dtype"), FORMS)
def test_weight_decay_is_that_of_sgd_with_momentum(nesterov, maximize, dtype):
    """The gradients' velocity is the method's, here by hand; the decay's is under test."""
    torch.manual_seed(0)
    start = torch.randn(50, dtype=dtype)
    options = {"lr": 0.1, "weight_decay": 0.3, "maximize": maximize}
    x, y, z = (torch.nn.Parameter(start.clone()) for _ in range(3))
    expected = torch.optim.SGD([x], momentum=0.8, nesterov=nesterov, **options)
    ours, outside = torch.optim.SGD([y], **options), torch.optim.SGD([z], **options)
    decay = DecayVelocity(ef.MomentumCorrection(ef.Identity(), 0.8, nesterov))
    velocity = torch.zeros_like(x)
    for step in range(20):
        x.grad = torch.randn_like(x)
        velocity = 0.8 * velocity + x.grad
        direction = x.grad + 0.8 * velocity if nesterov else velocity
        y.grad, z.grad = direction.clone(), direction.clone()
        decay.add_to_gradients(ours)
        for optimizer in (expected, ours, outside):
            optimizer.step()
        if step == 9:  # as after a checkpoint
            saved = decay.state_dict([(y, "y")])
            decay = DecayVelocity(ef.MomentumCorrection(ef.Identity(), 0.8, nesterov))
            decay = decay.loaded(saved, [(y, "y")])
        if step in (11, 15):  # a decay that ends fades, and may come back
            for optimizer in (expected, ours, outside):
                optimizer.param_groups[0]["weight_decay"] = 0.0 if step == 11 else 0.2
    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)
    assert (z - x).abs().max() > 0.1, "without a velocity of the decay it ends elsewhere"


def test_no_other_decay_gets_a_velocity():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    for method, optimizer in (
        (METHOD, torch.optim.SGD([p], lr=0.1)),
        (METHOD, torch.optim.Adagrad([p], lr=0.1, weight_decay=0.1)),
        (ef.ErrorFeedback(ef.OneBit()), torch.optim.SGD([p], lr=0.1, weight_decay=0.1)),
    ):
        decay = DecayVelocity(method)
        for _ in range(3):
            decay.add_to_gradients(optimizer)
        assert torch.equal(p.grad, torch.ones(3))
        assert decay.state_dict([(p, "p")]) == {}


def test_what_would_go_without_momentum_is_refused():
    with pytest.raises(ef.UnsupportedError, match="'emb' is sparse .* pass sparse_as_dense=True"):
        shared.refuse_rows(METHOD, "emb")
    with pytest.raises(ef.UnsupportedError, match="in ef.Compression with one rank, expected more"):
        shared.refuse_one_rank(METHOD, 1)
    shared.refuse_one_rank(METHOD, 2)
    shared.refuse_rows(ef.ErrorFeedback(ef.OneBit()), "emb")
    alone, dense = shared.for_one_rank(METHOD, lambda name, parameter: False)
    assert alone == dense("w", None) == ef.MomentumCorrection(ef.Identity(), momentum=0.8)


def test_a_velocity_of_another_shape_is_refused():
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"velocity of 'p' in shape \(4,\), expected \(3,\)"):
        DecayVelocity(METHOD).loaded({"p": torch.zeros(4)}, [(p, "p")])
