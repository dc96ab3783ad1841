"""Refusals for methods that contain momentum (`Method.sgd_momentum`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.training.policy import DensePolicy, Parameter, method_of


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


def refuse_rows(method: Method, name: str) -> None:
    """Raise if the sparse gradient of parameter `name` would be sent as rows, without momentum.

    Raises:
        UnsupportedError: the method has momentum.
    """
    if method.sgd_momentum is not None:
        raise UnsupportedError(
            f"the gradient of '{name}' is sparse with {method!r}, expected a dense one, because "
            "rows are sent without momentum; pass sparse_as_dense=True to ef.DistributedOptimizer "
            "or ef.Reducer"
        )


def refuse_one_rank(method: Method, ranks: int) -> None:
    """Raise if stock Horovod would not call `ef.Compression`, so that momentum would be missing.

    Raises:
        UnsupportedError: there is one rank, and the method has momentum.
    """
    if ranks == 1 and method.sgd_momentum is not None:
        raise UnsupportedError(
            f"got {method!r} in ef.Compression with one rank, expected more, because Horovod does "
            "not call it then and the momentum would be missing; take ef.DistributedOptimizer"
        )


def for_one_rank(method: Method, dense: DensePolicy) -> tuple[Method, DensePolicy]:
    """Method and policy of a rank without others: momentum and clipping, without compression."""

    def policy(name: str, parameter: Parameter) -> bool | Method:
        own = method_of(dense, name, parameter, method)
        return True if own is None else own.uncompressed() or True

    return method.uncompressed() or method, policy
