"""Optimizers that hold others, that are taken out of the wrapping again, and that are copied."""

from __future__ import annotations

import copy
import pickle

import horovod.torch as hvd
import torch
from common import error_of, report
from torch.optim.lr_scheduler import LambdaLR
from torch_common import batches, build_model, digest, flat, train

import ef_horovod.torch as ef

METHOD = ef.EF21(ef.TopK(ratio=0.1))


class Sam(torch.optim.Optimizer):
    """Holds the optimizer that steps, which shares its groups, as common versions of SAM do."""

    def __init__(self, params, base, **options):
        super().__init__(params, options)
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    def step(self, closure=None):
        self.base.step()

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.base.param_groups = self.param_groups


class Lookahead(torch.optim.Optimizer):
    """Loads itself and then what it holds, as the most common version does."""

    def __init__(self, base):
        super().__init__(base.param_groups, base.defaults)
        self.base, self.param_groups = base, base.param_groups

    def step(self, closure=None):
        self.base.step()

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state):
        super().load_state_dict({"state": {}, "param_groups": state["param_groups"]})
        self.base.load_state_dict(state)


class Front(torch.optim.Optimizer):
    """Has no groups but those of the optimizer that it holds."""

    def __init__(self, base):
        self.base = base

    @property
    def param_groups(self):
        return self.base.param_groups

    def step(self, closure=None):
        self.base.step()

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state):
        self.base.load_state_dict(state)


class InPlace(torch.optim.SGD):
    """Loads into the groups that it has."""

    def load_state_dict(self, state):
        for group, new in zip(self.param_groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in new.items() if name != "params"})


class Combined(torch.optim.Optimizer):
    """Its groups are a new list each time."""

    def __init__(self, *parts):
        self.parts = parts

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5)


KINDS = {
    "sgd": lambda ps: sgd(ps),
    "sam": lambda ps: Sam(ps, torch.optim.SGD, lr=0.1),
    "lookahead": lambda ps: Lookahead(sgd(ps)),
    "lookahead of sam": lambda ps: Lookahead(Sam(ps, torch.optim.SGD, lr=0.1)),
    "front": lambda ps: Front(sgd(ps)),
    "in place": lambda ps: InPlace(ps, lr=0.1),
    "combined": lambda ps: Combined(sgd(ps[:2]), torch.optim.Adam(ps[2:], lr=0.1)),
}


def rates_after_a_load(kind):
    """How far parameters go when the rate is set in the groups, and by schedulers, after loads."""
    model, next_batch = build_model(), batches(hvd.rank())
    plain = KINDS[kind](list(model.parameters()))
    earlier = LambdaLR(plain, lambda _: 1.0)
    optimizer = ef.DistributedOptimizer(plain, model.named_parameters(), compression=METHOD)
    later = LambdaLR(optimizer, lambda calls: float(calls == 0))
    train(model, optimizer, next_batch, 1)
    for _ in range(2):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def moved():
        before = flat(model)
        train(model, optimizer, next_batch, 1)
        return float((flat(model) - before).abs().max())

    distances = {}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    distances["groups"] = moved()
    earlier.step()
    distances["earlier"] = moved()
    later.step()
    distances["later"] = moved()
    return {"distances": distances, "end": digest(model)}


def freezing_by_wrapping_again():
    model, next_batch = build_model(), batches(hvd.rank())
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, fused=True)
    known = {*vars(plain), "_opt_called"}  # which the scheduler adds
    optimizer = ef.DistributedOptimizer(plain, model.named_parameters(), compression=METHOD)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, next_batch, 3)
    optimizer.unwrap()
    facts = {"type": type(optimizer) is torch.optim.SGD, "other": [*set(vars(optimizer)) ^ known]}
    before = digest(model)
    train(copy.deepcopy(model), optimizer, next_batch, 1)  # gradients of another model: no step
    facts["idle"] = digest(model) == before
    model[0].requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    optimizer = ef.DistributedOptimizer(optimizer, model.named_parameters(), compression=METHOD)
    scheduler.step()
    train(model, optimizer, next_batch, 3)
    facts |= {
        "lr": optimizer.param_groups[0]["lr"],
        "still": bool(frozen.equal(model[0].weight)),
        "momentum": len(optimizer.state),
        "end": digest(model),
    }
    return facts


def copies():
    model, next_batch = build_model(), batches(hvd.rank())
    plain = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = ef.DistributedOptimizer(plain, model.named_parameters(), compression=METHOD)
    train(model, optimizer, next_batch, 2)
    other, copied = copy.deepcopy((model, optimizer))
    pickled = pickle.loads(pickle.dumps(optimizer))
    facts = {"pickled": error_of(pickled.step)}
    states = [str(one.state_dict()) for one in (optimizer, copied, pickled)]
    facts["states"] = len(set(states))
    copied.load_state_dict(optimizer.state_dict())
    facts["step"] = error_of(copied.step)
    facts["synchronize"] = error_of(copied.synchronize)
    with copied.skip_synchronize():
        facts["skip"] = error_of(copied.step)
    facts["kept"] = digest(other) == digest(model)
    facts["again"] = error_of(lambda: ef.DistributedOptimizer(copied, other.named_parameters()))
    copied.unwrap()
    copied = ef.DistributedOptimizer(copied, other.named_parameters(), compression=METHOD)
    train(other, copied, next_batch, 2)
    train(model, optimizer, next_batch, 2)
    facts["ends"] = [digest(model), digest(other)]
    return facts


def main() -> None:
    hvd.init()
    found = {"rates": {kind: rates_after_a_load(kind) for kind in KINDS}}
    found["freezing"] = freezing_by_wrapping_again()
    found["copies"] = copies()
    report(hvd.rank(), found)


main()
