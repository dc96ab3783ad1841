"""A torch optimizer beside a method with momentum: no second one, and the weight decay's part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.training.momentum import refuse_momentum, require_plain_sgd

Groups = Iterable[Mapping[str, Any]]
Named = Iterable[tuple[torch.Tensor, str]]


def require_fit(optimizer: Any, method: Method) -> None:
    """Raise if a torch optimizer does again what the method does.

    Raises:
        UnsupportedError: it has momentum too, or is not plain SGD beside a method that makes
            updates.
    """
    require_no_momentum(optimizer.param_groups, method)
    if not method.makes_updates:
        return
    found = "" if isinstance(optimizer, torch.optim.SGD) else f"the rule of {_name(optimizer)}"
    momenta = [group["momentum"] for group in optimizer.param_groups if group.get("momentum")]
    require_plain_sgd(method, found or (f"momentum={momenta[0]}" if momenta else ""))


def _name(optimizer: Any) -> str:
    """Of the user's class, not of a class that wraps it."""
    kinds = (kind for kind in type(optimizer).__mro__ if kind.__module__.startswith("torch."))
    return next(kinds, type(optimizer)).__name__


def require_no_momentum(groups: Groups, method: Method) -> None:
    """Raise if an optimizer has momentum beside that of the method.

    Raises:
        UnsupportedError: it has.
    """
    refuse_momentum(method, _momenta(groups))


def _momenta(groups: Groups) -> Iterator[tuple[str, Any]]:
    for group in groups:
        yield "momentum", group.get("momentum")
        yield "beta1", group.get("beta1")  # of Adafactor
        betas = group.get("betas")
        yield "betas", betas if betas and betas[0] else None


def require_no_weight_decay(groups: Groups, method: Method) -> None:
    """Raise if weight decay would act outside the momentum.

    Raises:
        UnsupportedError: it would.
    """
    for group in groups if method.sgd_momentum is not None else ():
        if group.get("weight_decay"):
            raise UnsupportedError(
                f"got weight_decay={group['weight_decay']} beside {method!r} in ef.Compression, "
                "expected none, because the decay would have no momentum; take "
                "ef.DistributedOptimizer, which gives it momentum, or add the decay to the loss"
            )


class DecayVelocity:
    """Gives the weight decay of `torch.optim.SGD` the momentum that a method gives to gradients.

    SGD adds wd p to the averaged gradient, after the method's momentum. Momentum is linear, and p
    is the same on all ranks. So the decay has a second velocity, which is not compressed. It is
    added to p.grad and holds the part that SGD with momentum would add for the decay of earlier
    steps.

    Args:
        method: of the gradients.
    """

    def __init__(self, method: Method) -> None:
        self._method, self._momentum = method, method.sgd_momentum
        self._velocity: dict[torch.Tensor, torch.Tensor] = {}  # m times that of wd p

    @torch.no_grad()
    def add_to_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Before a step of the optimizer with averaged gradients; only SGD's decay is of this kind.

        With m = momentum: p.grad += u, u = m (u + wd p); Nesterov's form in the other order.
        """
        if self._momentum is None or not isinstance(optimizer, torch.optim.SGD):
            return
        momentum, nesterov = self._momentum
        for group in optimizer.param_groups:
            sign = -1 if group.get("maximize") else 1
            for p in group["params"]:
                # A decay that ended fades with its velocity.
                if p.grad is None or not (group["weight_decay"] or p in self._velocity):
                    continue
                if p not in self._velocity:
                    self._velocity[p] = torch.zeros_like(p)
                u = self._velocity[p]
                if not nesterov:
                    p.grad.add_(u, alpha=sign)
                u.add_(p, alpha=group["weight_decay"]).mul_(momentum)
                if nesterov:
                    p.grad.add_(u, alpha=sign)

    def state_dict(self, named: Named) -> dict[str, torch.Tensor]:
        """The velocities by parameter name."""
        return {name: self._velocity[p].clone() for p, name in named if p in self._velocity}

    def loaded(self, state: Mapping[str, torch.Tensor], named: Named) -> DecayVelocity:
        """A new object with the result of `state_dict`.

        Raises:
            ValueError: a velocity has another shape than its parameter.
        """
        new = DecayVelocity(self._method)
        for p, name in named:
            if name in state:
                if state[name].shape != p.shape:
                    raise ValueError(
                        f"got the weight decay's velocity of '{name}' in shape "
                        f"{tuple(state[name].shape)}, expected {tuple(p.shape)}; load it into the "
                        "same model"
                    )
                new._velocity[p] = torch.zeros_like(p).copy_(torch.as_tensor(state[name]))
        return new
