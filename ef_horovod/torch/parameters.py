"""The parameters of an optimizer with their names, from all that people pass for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """The parameters of an optimizer with their names, in the order of the names given.

    And the frozen ones (such as a backbone) that are named and not the optimizer's.

    Args:
        named_parameters: as of `pairs_of`; None to number them.
        param_groups: of the optimizer.

    Raises:
        ValueError: a parameter of the optimizer has no name, or see `require_distinct`.
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
    """(name, parameter) of `model.named_parameters()`, of a dict of them, or of the model.

    Raises:
        UnsupportedError: it is something else, such as `model.parameters()` or a method.
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
        UnsupportedError: there is something else among them.
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
    """What is in it, as pairs where there are names; itself if it has nothing in it."""
    if isinstance(given, torch.nn.Module):
        return list(given.named_parameters())
    if isinstance(given, Mapping):
        return list(given.items())
    try:
        return list(given)
    except TypeError:
        return [given]


def _shown(given: Any) -> str:
    """Short: a method as it is written, all else by type."""
    return (
        repr(given)
        if isinstance(given, Method | Compressor)
        else f"something of type {type(given).__name__}"
    )
