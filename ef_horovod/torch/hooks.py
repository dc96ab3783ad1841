"""Hooks that run when a parameter's gradient is ready, one optimizer's for each parameter;
`torch.compile` skips them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ef_horovod.errors import UnsupportedError


class Owned:
    """Parameters that a wrapped optimizer averages; no other one may, until `remove()`.

    Args:
        names: of the parameters.

    Raises:
        UnsupportedError: another wrapped optimizer has one of them.
    """

    def __init__(self, names: Mapping[torch.Tensor, str]) -> None:
        for other in _live:
            taken = [name for p, name in names.items() if p in other._parameters]
            if taken:
                raise UnsupportedError(
                    f"'{taken[0]}' is averaged by another wrapped optimizer already, "
                    "expected one; call unwrap() on the other one first"
                )
        self._parameters: set[torch.Tensor] = set(names)
        _live.add(self)

    def remove(self) -> None:
        """Give them free."""
        _live.discard(self)


class GradientHooks(Owned):
    """Calls a bound method for each gradient that backward has accumulated.

    The hooks hold the method's object weakly, so that a model does not keep the engine of a
    deleted optimizer alive.

    Args:
        names: of the parameters.
        call: bound method that takes the parameter.

    Raises:
        UnsupportedError: another wrapped optimizer has one of the parameters.
    """

    def __init__(
        self, names: Mapping[torch.Tensor, str], call: Callable[[torch.Tensor], None]
    ) -> None:
        super().__init__(names)
        hook = torch.compiler.disable(weak(call))
        self._handles = [p.register_post_accumulate_grad_hook(hook) for p in names]

    def remove(self) -> None:
        """Remove the hooks."""
        super().remove()
        for handle in self._handles:
            handle.remove()


_live: weakref.WeakSet[Owned] = weakref.WeakSet()


def weak(method: Callable[..., None]) -> Callable[..., None]:
    """A function that calls a bound method while its object is alive."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*arguments)

    return call


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, excluded from `torch.compile` and compiled autograd.

    It communicates with other ranks, and much of it is NumPy. The compiler is imported at the first
    call, because the import takes seconds. Torch's optimizers import it anyway.
    """

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        return _left_out(function)(*arguments, **options)

    return call


@functools.cache
def _left_out(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)
