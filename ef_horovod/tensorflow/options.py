"""Options of `ef.Reducer`, which tape and optimizer pass on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import horovod.tensorflow as hvd

from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.warmup import refuse_dense_steps
from ef_horovod.methods.base import Method
from ef_horovod.tensorflow.server_transport import GraphTransport
from ef_horovod.training.choice import choose, wants_server
from ef_horovod.training.options import check_options
from ef_horovod.training.policy import (
    DensePolicy,
    refuse_elastic,
    refuse_process_set,
    require_method,
)


class ReducerOptions(TypedDict, total=False):
    """Keywords of `ef.Reducer`, with their types; a test compares the two."""

    op: Any  # hvd.Average or hvd.Sum
    dense: DensePolicy
    exchange: str
    bucket_bytes: int
    seed: int
    dense_steps: int
    sparse_as_dense: bool
    check_sync: bool
    discardable: bool
    process_set: Any  # of Horovod
    timeout: float | None
    transport: GraphTransport | None


@dataclass(frozen=True)
class Options:
    """How gradients are reduced; equal on all ranks. See `ef.Reducer`."""

    method: Method
    average: bool
    dense: DensePolicy
    exchange: str
    bucket_bytes: int
    seed: int
    dense_steps: int
    sparse_as_dense: bool
    check_sync: bool
    discardable: bool
    what: str = "gradients"  # or "updates"; ranks compare it


def require_options(
    compression: Any,
    *,
    op: Any = hvd.Average,
    exchange: str = "auto",
    process_set: Any = None,
    dense_steps: int = 0,
    **others: Any,
) -> None:
    """Reject options that `ef.Reducer` would reject, before the variables exist.

    Raises:
        UnsupportedError: the combination cannot work; the message names an alternative.
        TypeError: there is no such option.
        ValueError: there is no such exchange.
    """
    refuse_elastic()
    given = {"exchange": exchange, "process_set": process_set, "dense_steps": dense_steps}
    check_options("Reducer", **given, **others)
    known = list(ReducerOptions.__annotations__)
    for name in others:
        if name not in known:
            raise TypeError(
                f"got an option {name!r}, expected one of ef.Reducer's: {', '.join(known)}"
            )
    if op not in (hvd.Average, hvd.Sum):
        raise UnsupportedError(
            f"got op={op!r}, expected hvd.Average or hvd.Sum, because Adasum combines dense "
            "vectors; use hvd.DistributedGradientTape without compression for it"
        )
    if wants_server(exchange):
        refuse_process_set(process_set)
    refuse_dense_steps(choose(exchange, require_method(compression)), dense_steps)
