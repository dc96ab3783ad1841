"""Refusals for methods that do a part of the optimizer's work (`Method.replaces_optimizer`)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from ef_horovod.compressors.identity import Identity
from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.methods.no_feedback import NoFeedback
from ef_horovod.training.policy import DensePolicy, Parameter, method_of

_ADAPTIVE = {"adam", "adamw", "adamax", "nadam", "radam"}  # classes, in lower case


def refuse_momentum(method: Method, found: Iterable[tuple[str, Any]]) -> None:
    """Raise if the optimizer has momentum too.

    Args:
        method: of the gradients.
        found: the optimizer's options that are a momentum, with their values.

    Raises:
        UnsupportedError: method and optimizer have momentum.
    """
    if method.sgd_momentum is None:
        return
    for option, value in found:
        if value:
            raise UnsupportedError(
                f"got an optimizer with {option}={value} and {method!r} with "
                f"momentum={method.sgd_momentum.momentum}, expected momentum in one of them, "
                "because it would be applied twice; take SGD with momentum=0, or "
                "ErrorFeedback(...) to keep the optimizer's"
            )


def require_plain_sgd(method: Method, found: str) -> None:
    """Raise if the method makes updates, and the optimizer does more than x - lr * update.

    Args:
        method: of the gradients.
        found: what the optimizer is or has beyond plain SGD, or "".

    Raises:
        UnsupportedError: it does.
    """
    if method.makes_updates and found:
        raise UnsupportedError(
            f"got an optimizer with {found} and {method!r}, whose aggregated gradients are the "
            "finished updates of Adam, expected plain SGD; take SGD without momentum and clipping, "
            "with Adam's learning rate and AdamW's weight decay"
        )


def warn_of_adam(optimizer: Any, methods: Iterable[Method], rank: int) -> None:
    """Warn on rank 0 if Adam or the like gets gradients with error feedback.

    Args:
        optimizer: of any framework.
        methods: of the opened buckets, which may be uncompressed after all.
        rank: of this process.
    """
    kinds = {kind.__name__.lower() for kind in type(optimizer).__mro__}
    lossy = (m for m in methods if not isinstance(m, NoFeedback) and m.compressor != Identity())
    method = next(lossy, None)
    if rank == 0 and kinds & _ADAPTIVE and method is not None:
        warnings.warn(
            f"got {type(optimizer).__name__} with {method!r}, expected ef.CompressedUpdates or "
            "FrozenAdam, because Adam learns less per step from compressed gradients; wrap it in "
            "ef.CompressedUpdates instead, or take SGD with FrozenAdam(...), Adam's learning rate "
            "and dense_steps, or compare losses with dense training",
            stacklevel=3,
        )


def refuse_synchronize(method: Method) -> None:
    """Raise for a `synchronize()` of the user, after which gradients are usually clipped.

    Raises:
        UnsupportedError: the method makes updates.
    """
    if method.makes_updates:
        raise UnsupportedError(
            f"got synchronize() with {method!r}, whose aggregated gradients are the finished "
            "updates of Adam, expected step() alone, because clipping them would only shorten "
            "steps; to clip gradients pass clip= to the method"
        )


def refuse_rows(method: Method, name: str) -> None:
    """Raise if the sparse gradient of parameter `name` would be sent as rows, without momentum.

    Raises:
        UnsupportedError: the method has momentum, or makes updates.
    """
    if method.replaces_optimizer:
        raise UnsupportedError(
            f"the gradient of '{name}' is sparse with {method!r}, expected a dense one, because "
            "rows are sent without momentum; pass sparse_as_dense=True to ef.DistributedOptimizer "
            "or ef.Reducer"
        )


def refuse_one_rank(method: Method, ranks: int) -> None:
    """Raise if stock Horovod would not call `ef.Compression`, so that momentum would be missing.

    Raises:
        UnsupportedError: there is one rank, and the method has momentum, or makes updates.
    """
    if ranks == 1 and method.replaces_optimizer:
        raise UnsupportedError(
            f"got {method!r} in ef.Compression with one rank, expected more, because Horovod does "
            "not call it then and momentum would be missing; take ef.DistributedOptimizer"
        )


def require_included(method: Method, included: bool) -> None:
    """Raise on a rank outside of the process set, whose optimizer would train without the method.

    Raises:
        UnsupportedError: the method has momentum, or makes updates.
    """
    if not included and method.replaces_optimizer:
        raise UnsupportedError(
            f"got {method!r} on a rank outside of its process_set, expected a rank in it, because "
            "the plain optimizer has no momentum here; wrap the optimizer on the ranks of the set "
            "only"
        )


def for_one_rank(method: Method, dense: DensePolicy) -> tuple[Method, DensePolicy]:
    """Method and policy of a rank without others: momentum and clipping, without compression."""

    def policy(name: str, parameter: Parameter) -> bool | Method:
        own = method_of(dense, name, parameter, method)
        return True if own is None else own.uncompressed() or True

    return method.uncompressed() or method, policy
