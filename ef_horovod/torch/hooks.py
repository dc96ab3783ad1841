"""Hooks that are called when a parameter's gradient exists."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ef_horovod.errors import UnsupportedError


class GradientHooks:
    """Calls a bound method for each gradient that backward has accumulated.

    They hold the method's object weakly: a model must not keep the reducer of a forgotten optimizer
    at work.

    Args:
        names: of the parameters.
        call: bound method that takes the parameter.

    Raises:
        UnsupportedError: a parameter has such a hook already.
    """

    def __init__(
        self, names: Mapping[torch.Tensor, str], call: Callable[[torch.Tensor], None]
    ) -> None:
        for other in _live:
            for parameter in names.keys() & other._parameters:
                raise UnsupportedError(
                    f"the gradient of '{names[parameter]}' is averaged by another wrapped "
                    "optimizer already, expected one; call unwrap() on the other one first"
                )
        self._parameters: set[torch.Tensor] = set(names)
        hook = weak(call)
        self._handles = [p.register_post_accumulate_grad_hook(hook) for p in names]
        _live.add(self)

    def remove(self) -> None:
        """Leave the parameters alone from now on."""
        for handle in self._handles:
            handle.remove()
        _live.discard(self)


_live: weakref.WeakSet[GradientHooks] = weakref.WeakSet()


def weak(method: Callable[..., None]) -> Callable[..., None]:
    """A function that calls a bound method for as long as its object lives."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*arguments)

    return call
