"""How PyTorch gradients are averaged, and over which transport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
import torch

from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.training.choice import wants_server
from ef_horovod.training.momentum import require_included
from ef_horovod.training.policy import DensePolicy, is_elastic, refuse_process_set
from ef_horovod.transports.base import Transport
from ef_horovod.transports.horovod import next_prefix
from ef_horovod.transports.horovod_torch import HorovodTorchTransport
from ef_horovod.transports.timeouts.ending import watch_over


@dataclass(frozen=True)
class Options:
    """How gradients are reduced; equal on all ranks.

    Args:
        method: for the compressed buckets.
        dense: policy that selects the parameters that stay uncompressed; they share one allreduce.
        exchange: "auto", "auto:NETWORK", "gather", "reduce", "double_pass" or
            "hierarchical".
        bucket_bytes: size of a compressed bucket in bytes of float32.
        passes: backward passes accumulated before an exchange.
        seed: of random compressors.
        dense_steps: how many steps are uncompressed averages before compression starts.
        average: deliver means over ranks (False: sums).
        sparse_as_dense: whether sparse gradients are densified; otherwise they are sent as rows.
        overlap: start exchanges during backward (False: all in `finish`). The first step's always
            start in `finish`, which checks the config first.
        check_sync: whether ranks' parameters are compared; see `SyncCheck`.
    """

    method: Method
    dense: DensePolicy
    exchange: str
    bucket_bytes: int
    passes: int
    seed: int
    dense_steps: int
    average: bool
    sparse_as_dense: bool
    overlap: bool
    check_sync: bool

    def facts(self, *, scaled: bool) -> str:
        """What must be equal on all ranks; `scaled`: whether there is a GradScaler."""
        return (
            f"exchange={self.exchange!r}, seed={self.seed}, average={self.average}, "
            f"dense_steps={self.dense_steps}, "
            f"backward_passes_per_step={self.passes}, grad_scaler={scaled}, "
            f"check_sync={self.check_sync}, sparse_as_dense={self.sparse_as_dense}"
        )


def refuse_unsupported(
    optimizer: Any, op: Any, gradient_predivide_factor: float, num_groups: int, groups: Any
) -> None:
    """Reject options that cannot work with compression.

    Raises:
        UnsupportedError: an option is not supported; the message names an alternative.
    """
    if op not in (hvd.Average, hvd.Sum):
        raise UnsupportedError(
            f"got op={op!r}, expected hvd.Average or hvd.Sum, because others (Adasum too) combine "
            "dense vectors; use hvd.DistributedOptimizer without compression for them"
        )
    if gradient_predivide_factor != 1.0:
        raise UnsupportedError(
            f"got gradient_predivide_factor={gradient_predivide_factor}, expected 1.0, because "
            "sums are float32 here and do not overflow; leave it out"
        )
    if num_groups or groups is not None:
        raise UnsupportedError(
            f"got groups={groups or num_groups!r}, expected none, because buckets replace them; "
            "leave it out and set bucket_bytes"
        )
    if not hasattr(optimizer, "param_groups"):
        raise UnsupportedError(
            f"got {type(optimizer).__name__} as optimizer, expected a torch optimizer; write for "
            "example ef.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), "
            "model.named_parameters(), compression=method)"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            "got LBFGS, expected an optimizer that needs one gradient a step; use SGD or Adam"
        )
    if hasattr(optimizer, "_allreduce_grad_async") or hasattr(optimizer, "_engine"):
        raise UnsupportedError(
            "got an optimizer that is wrapped already, expected a plain torch optimizer; "
            "wrap it once, by hvd.DistributedOptimizer, ef.DistributedOptimizer or "
            "ef.CompressedUpdates, or call its unwrap() before"
        )


def open_transport(
    exchange: str, process_set: Any, timeout: float | None, method: Method
) -> Transport | None:
    """Transport to the other ranks or the servers; None where the plain optimizer is enough."""
    if wants_server(exchange):
        from ef_horovod.server.client import ServerTransport

        refuse_process_set(process_set)
        return ServerTransport(timeout)
    process_set = process_set or hvd.global_process_set
    prefix = next_prefix("ef", process_set)  # wrap optimizers in the same order on all ranks
    require_included(method, process_set.included())
    needed = method.replaces_optimizer or process_set.size() > 1 or is_elastic()
    if process_set.included() and needed:
        return _watched(HorovodTorchTransport(prefix, process_set, timeout))
    return None


def reopened(transport: Transport) -> HorovodTorchTransport:
    """A transport between the present ranks with the names of a former one."""
    assert isinstance(transport, HorovodTorchTransport)
    return _watched(HorovodTorchTransport(transport.prefix, None, transport.timeout))


def _watched(transport: HorovodTorchTransport) -> HorovodTorchTransport:
    watch_over(transport, hvd.shutdown)
    return transport
