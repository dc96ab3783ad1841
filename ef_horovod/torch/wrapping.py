"""Gives an optimizer a class with more methods; supports loading, copying and pickling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch

from ef_horovod.errors import UnsupportedError
from ef_horovod.torch.hooks import uncompiled

_HOROVODS = "horovod.torch.optimizer"  # by this name Horovod knows distributed optimizers
_NOT_MEMBERS = ("__dict__", "__weakref__", "__annotations__", "__module__", "__doc__")


def wrap(optimizer: torch.optim.Optimizer, methods: type) -> Any:
    """The optimizer under a new class with these methods; state and groups are shared.

    Args:
        optimizer: stays unchanged, but for a flag of torch's.
        methods: a class whose members, and those of its bases, go into the new class. `unwrap`
            removes them again, and instance attributes of the same names.
    """
    wrapped: Any = object.__new__(_class_of(type(optimizer), methods))
    wrapped.__dict__.update(optimizer.__dict__)
    # An earlier scheduler has put a wrapped `step` into the instance, which would hide ours. It
    # looks at the given optimizer, and would warn that this one never takes a step.
    if wrapped.__dict__.pop("step", None) is not None:
        optimizer._opt_called = True  # type: ignore[attr-defined]
    return wrapped


def unwrap(wrapped: Any) -> None:
    """Make a wrapped optimizer a plain one again."""
    for name in _own(wrapped._methods):
        wrapped.__dict__.pop(name, None)
    wrapped.__class__ = wrapped._base


@contextmanager
def same_groups(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """State loaded inside goes into the existing dicts of parameter groups.

    Schedulers made before the wrapping hold these dicts, and so do inner optimizers (SAM,
    Lookahead). Shared dicts stay shared.
    """
    before = [(one, list(one.param_groups)) for one in _all_held_by(optimizer)]
    yield
    for one, groups in before:
        loaded = one.param_groups
        if len(loaded) != len(groups):
            continue  # the optimizer has its own way of loading
        for group, new in zip(groups, loaded, strict=True):
            if group is not new:
                contents = dict(new)
                group.clear()
                group.update(contents)
        loaded[:] = groups  # the same list: an inner optimizer may share it


def copied(wrapped: Any, protocol: Any) -> tuple[Any, ...]:
    """Copy or pickle a wrapped optimizer with its state, without its exchange."""
    _, _, *rest = wrapped._base.__reduce_ex__(wrapped, protocol)
    if rest and isinstance(rest[0], dict):
        ours = _own(wrapped._methods)
        rest[0] = {name: value for name, value in rest[0].items() if name not in ours}
    return _make_copy, (wrapped._base, wrapped._methods), *rest


class NoExchange:
    """Stands for a copy's engine; all methods that would average gradients raise."""

    def close(self) -> None:
        """Do nothing."""

    def reset_passes(self) -> None:
        """Do nothing, so that a copy can load a state."""

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError(
            "got a copy of a wrapped optimizer, expected the wrapped one itself, because a copy "
            "has no exchange with other ranks; call unwrap() on the copy and wrap it again"
        )


def _make_copy(base: type, methods: type) -> Any:
    copy: Any = object.__new__(_class_of(base, methods))
    copy._engine = NoExchange()
    return copy


def _own(methods: type) -> set[str]:
    """Names of instance attributes that only these methods use.

    Properties such as `_step_supports_amp_scaling` are the base's attributes in the instance.
    """
    members = _members(methods)
    return {name for name, member in members.items() if not isinstance(member, property)}


def _members(methods: type) -> dict[str, Any]:
    """Those of the class and of its bases."""
    found: dict[str, Any] = {}
    for each in reversed(methods.__mro__[:-1]):
        found |= {name: m for name, m in vars(each).items() if name not in _NOT_MEMBERS}
    return found


def _class_of(base: type, methods: type) -> type:
    members = {
        name: uncompiled(m) if isinstance(m, FunctionType) else m
        for name, m in _members(methods).items()
    }
    members |= {"_base": base, "_methods": methods, "__module__": _HOROVODS}
    return type(base.__name__, (base,), members)


def _all_held_by(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizer, and all optimizers in its attributes, or in lists and tuples there."""
    found = [optimizer]
    for one in found:  # grows during the loop
        for value in vars(one).values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if isinstance(inner, torch.optim.Optimizer) and all(inner is not o for o in found):
                    found.append(inner)
    return found
