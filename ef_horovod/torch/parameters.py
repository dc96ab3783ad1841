"""An optimizer's parameters with their names, from the forms that users pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ef_horovod.compressors.base import Compressor
from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.training.policy import require_distinct

Named = list[tuple[str, torch.Tensor]]


def name_parameters(
    named_parameters: Any, param_groups: Sequence[dict[str, Any]]
) -> tuple[Named, list[torch.Tensor]]:
    """The optimizer's parameters with their names, in the given order.

    The second result has the named frozen parameters (such as a backbone) outside the optimizer.

    Args:
        named_parameters: as for `pairs_of`; None to number them.
        param_groups: of the optimizer.

    Raises:
        ValueError: a parameter of the optimizer has no name; see also `require_distinct`.
        UnsupportedError: see `pairs_of` and `require_distinct`.
    """
    owned = [p for group in param_groups for p in group["params"]]
    if named_parameters is None:
        named = [(f"parameter.{i}", p) for i, p in enumerate(owned)]
    else:
        named = pairs_of(named_parameters)
    unnamed = set(owned) - {p for _, p in named}
    if unnamed:
        raise ValueError(
            f"got named_parameters without {len(unnamed)} of the optimizer's {len(owned)} "
            "parameters, expected a name for each; pass model.named_parameters() of the whole model"
        )
    of_optimizer = set(owned)
    others = [p for _, p in named if p not in of_optimizer and not p.requires_grad]
    return require_distinct([(name, p) for name, p in named if p in of_optimizer]), others


def pairs_of(named_parameters: Any) -> Named:
    """(name, parameter) pairs of `model.named_parameters()`, of such a dict, or of a model.

    Raises:
        UnsupportedError: the argument is something else, such as `model.parameters()` or a method.
    """
    pairs = _items(named_parameters)
    for pair in pairs:
        match pair:
            case (str(), torch.Tensor()):
                continue
        raise UnsupportedError(
            f"got {_shown(pair)} in named_parameters, expected pairs of a name and a parameter; "
            "pass model.named_parameters(), and the method as compression="
        )
    return pairs


def tensors_of(parameters: Any) -> list[torch.Tensor]:
    """The tensors of a model, a dict, or an iterable of tensors or of pairs with a name.

    Raises:
        UnsupportedError: an element is not a tensor.
    """
    found = [parameters] if isinstance(parameters, torch.Tensor) else _items(parameters)
    tensors: list[Any] = [
        one[1] if isinstance(one, tuple) and len(one) == 2 else one for one in found
    ]
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise UnsupportedError(
                f"got {_shown(tensor)} among the parameters, expected tensors; pass "
                "model.parameters()"
            )
    return tensors


def _items(given: Any) -> list[Any]:
    """The elements as a list, as pairs if they have names; [given] if it is not iterable."""
    if isinstance(given, torch.nn.Module):
        return list(given.named_parameters())
    if isinstance(given, Mapping):
        return list(given.items())
    try:
        return list(given)
    except TypeError:
        return [given]


def _shown(given: Any) -> str:
    """Short form: the repr of a method or compressor, the type of anything else."""
    return (
        repr(given)
        if isinstance(given, Method | Compressor)
        else f"something of type {type(given).__name__}"
    )


def settings_of(groups: list[dict[str, Any]]) -> dict[tuple[int, str], Any]:
    """Learning rates and all other settings of parameter groups, by group and name."""
    return {
        (i, name): float(value) if isinstance(value, torch.Tensor) else value
        for i, group in enumerate(groups)
        for name, value in group.items()
        if name != "params"
    }


def require_unchanged(
    frozen: Iterable[tuple[str, torch.Tensor]], trained: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Raise if a parameter was frozen or unfrozen since the optimizer was wrapped.

    Args:
        frozen: those that required no gradient then, with their names.
        trained: the others.

    Raises:
        UnsupportedError: one of them changed.
    """
    thawed = [name for name, p in frozen if p.requires_grad]
    now_frozen = [name for name, p in trained if not p.requires_grad]
    for names, now in ((thawed, "requires a gradient"), (now_frozen, "requires no gradient")):
        if names:
            raise UnsupportedError(
                f"parameter '{names[0]}' {now} now, unlike when the optimizer was wrapped, "
                "expected no change; call optimizer.unwrap() and wrap the optimizer again"
            )
