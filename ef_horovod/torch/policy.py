"""Which parameters are compressed, under which names, by what: facts equal on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ef_horovod.compressors.base import Compressor
from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method

DensePolicy = Callable[[str, torch.Tensor], bool]
MIN_COMPRESSED_ELEMENTS = 1024


def small_or_vector(name: str, parameter: torch.Tensor) -> bool:
    """The default policy: biases, norms and whatever is small stay dense.

    They are a small part of the bytes and a large part of what goes wrong when it is compressed.
    A policy gets name and parameter and returns whether that one stays dense; it must decide the
    same on all ranks. `lambda name, parameter: False` compresses everything.
    """
    return parameter.dim() <= 1 or parameter.numel() < MIN_COMPRESSED_ELEMENTS


def name_parameters(
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None,
    param_groups: Sequence[dict[str, Any]],
) -> list[tuple[str, torch.Tensor]]:
    """The parameters of an optimizer with their names, in the order of the names given.

    Raises:
        ValueError: a name occurs twice, or a parameter of the optimizer has none.
    """
    owned = [p for group in param_groups for p in group["params"]]
    if named_parameters is None:
        named = [(f"parameter.{i}", p) for i, p in enumerate(owned)]
    else:
        named = list(named_parameters)
    names = [name for name, _ in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    unnamed = {id(p) for p in owned} - {id(p) for _, p in named}
    if twice or unnamed:
        raise ValueError(
            f"got named_parameters with {len(unnamed)} of the optimizer's parameters missing and "
            f"names that occur twice: {twice}, expected one name for each; "
            "pass model.named_parameters() of the whole model"
        )
    ids = {id(p) for p in owned}
    return [(name, p) for name, p in named if id(p) in ids]


def require_method(compression: Any) -> Method:
    """`compression` if it is a method.

    Raises:
        UnsupportedError: something else, with what to write in its place.
    """
    if isinstance(compression, Method):
        return compression
    if isinstance(compression, Compressor):
        way_out = f"wrap it: ErrorFeedback({compression}) or EF21({compression})"
    else:
        way_out = "write EF21(TopK(ratio=0.01)), or NoFeedback(Cast('float16')) for fp16"
    raise UnsupportedError(f"got compression={compression!r}, expected a method; {way_out}")
