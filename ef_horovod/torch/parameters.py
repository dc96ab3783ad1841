"""The parameters of an optimizer with their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ef_horovod.policy import require_distinct


def name_parameters(
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None,
    param_groups: Sequence[dict[str, Any]],
) -> list[tuple[str, torch.Tensor]]:
    """The parameters of an optimizer with their names, in the order of the names given.

    Raises:
        ValueError: a parameter of the optimizer has no name, or see `require_distinct`.
        UnsupportedError: see `require_distinct`.
    """
    owned = [p for group in param_groups for p in group["params"]]
    if named_parameters is None:
        named = [(f"parameter.{i}", p) for i, p in enumerate(owned)]
    else:
        named = list(named_parameters)
    unnamed = set(owned) - {p for _, p in named}
    if unnamed:
        raise ValueError(
            f"got named_parameters without {len(unnamed)} of the optimizer's {len(owned)} "
            "parameters, expected a name for each; pass model.named_parameters() of the whole model"
        )
    of_optimizer = set(owned)
    return require_distinct([(name, p) for name, p in named if p in of_optimizer])
