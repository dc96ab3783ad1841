"""Which parameters are compressed, under which names, by what: facts equal on all ranks."""

from __future__ import annotations

import os
from collections import Counter
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


def require_distinct(named: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """The argument, if each parameter is real and each name and parameter occurs once.

    Raises:
        ValueError: a name stands for two parameters, or a parameter has two names.
        UnsupportedError: a parameter is complex.
    """
    for what, items in (("name", [n for n, _ in named]), ("parameter", [p for _, p in named])):
        twice = [
            name for (name, _), item in zip(named, items, strict=True) if item in _twice(items)
        ]
        if twice:
            raise ValueError(
                f"got the same {what} more than once in named_parameters ({twice[:4]}), expected "
                "each once; pass model.named_parameters(), which lists tied parameters once"
            )
    for name, parameter in named:
        if parameter.is_complex():
            raise UnsupportedError(
                f"parameter '{name}' is complex, expected a real one, for float32 is what is sent; "
                "keep it as torch.view_as_real(...) and view it as complex in forward()"
            )
    return named


def _twice(items: Sequence[Any]) -> set[Any]:
    return {item for item, count in Counter(items).items() if count > 1}


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


def refuse_elastic() -> None:
    """Raise in an elastic job: memories and transports belong to a fixed set of ranks.

    Raises:
        UnsupportedError: always there.
    """
    if os.environ.get("HOROVOD_ELASTIC") == "1":
        raise UnsupportedError(
            "got an elastic Horovod job, expected a fixed number of ranks, for error memories do "
            "not follow ranks that come and go; start it with horovodrun -np N"
        )
