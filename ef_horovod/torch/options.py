"""How PyTorch gradients are averaged, and over which transport."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ef_horovod.common.extras import explained
from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.training.choice import wants_server
from ef_horovod.training.momentum import require_included
from ef_horovod.training.policy import DensePolicy, is_elastic, refuse_process_set
from ef_horovod.transports.base import Transport
from ef_horovod.transports.torch_distributed import TorchDistributed


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
    if not (averages(op) or _is(op, "sum", "Sum", dist.ReduceOp.SUM)):
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
        given = f"num_groups={num_groups!r}" if groups is None else f"groups={groups!r}"
        raise UnsupportedError(
            f"got {given}, expected none, because buckets replace them; "
            "leave it out and set bucket_bytes"
        )
    if not hasattr(optimizer, "param_groups"):
        raise UnsupportedError(
            f"got {type(optimizer).__name__} as optimizer, expected a torch optimizer; write for "
            "example ef.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), "
            "model.named_parameters(), compression=method)"
        )
    _refuse_shards(optimizer)
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


def _refuse_shards(optimizer: Any) -> None:
    """Raise for FSDP and ZeRO, where a rank has a part of each parameter or of the optimizer."""
    kinds = {kind.__name__ for kind in type(optimizer).__mro__}
    sharded = "ZeroRedundancyOptimizer" in kinds or any(
        hasattr(p, "_local_tensor") or hasattr(p, "_is_flat_param")
        for group in optimizer.param_groups
        for p in group["params"]
    )
    if sharded:
        raise UnsupportedError(
            "got parameters or an optimizer in shards (FSDP, ZeRO), expected whole ones on each "
            "rank, because a gradient's parts go to one rank each there; take plain data parallel "
            "training, or DDP with ef.ddp_hook"
        )


def averages(op: Any) -> bool:
    """Whether an `op=` is the average, in the words of this library, of Horovod or of torch."""
    return _is(op, "average", "Average", dist.ReduceOp.AVG)


def _is(op: Any, ours: str, of_horovod: str, of_torch: Any) -> bool:
    if isinstance(op, str | dist.ReduceOp | type(of_torch)):
        return bool(op in (ours, of_torch))
    hvd = sys.modules.get("horovod.torch")  # imported by those who have its op
    return hvd is not None and bool(op == getattr(hvd, of_horovod))


def open_transport(
    exchange: str, process_set: Any, timeout: float | None, method: Method, transport: Any = None
) -> Transport | None:
    """Transport to the other ranks or the servers; None where the plain optimizer is enough.

    Raises:
        UnsupportedError: `transport` is something else, or does not go with the other arguments.
    """
    if wants_server(exchange):
        from ef_horovod.server.client import ServerTransport

        refuse_process_set(process_set)
        return ServerTransport(timeout)
    if transport not in (None, "horovod"):
        return _over_torch(transport, process_set, timeout, method)
    if transport is None and dist.is_available() and dist.is_initialized() and not _runs_horovod():
        return _over_torch("torch", process_set, timeout, method)
    with explained("transport='horovod' (transport='torch' needs none, in a job by torchrun)"):
        return _over_horovod(process_set, timeout, method)


def _runs_horovod() -> bool:
    hvd = sys.modules.get("horovod.torch")
    return hvd is not None and bool(hvd.is_initialized())


def _over_torch(
    transport: Any, process_set: Any, timeout: float | None, method: Method
) -> Transport | None:
    if transport != "torch" and not isinstance(transport, TorchDistributed):
        raise UnsupportedError(
            f"got transport={transport!r}, expected 'horovod', 'torch' or a TorchDistributed; for "
            "a process group write transport=ef.TorchDistributed(group)"
        )
    if process_set is not None:
        raise UnsupportedError(
            "got a process_set, which is Horovod's, with a transport over torch.distributed, "
            "expected none; write transport=ef.TorchDistributed(group) for some of the ranks"
        )
    if transport == "torch":
        transport = TorchDistributed(timeout=timeout)
    elif timeout is not None:
        transport.timeout = timeout
    return transport if method.replaces_optimizer or transport.size > 1 else None


def _over_horovod(process_set: Any, timeout: float | None, method: Method) -> Transport | None:
    import horovod.torch as hvd

    from ef_horovod.transports.horovod import next_prefix
    from ef_horovod.transports.horovod_torch import HorovodTorchTransport

    process_set = process_set or hvd.global_process_set
    prefix = next_prefix("ef", process_set)  # wrap optimizers in the same order on all ranks
    require_included(method, process_set.included())
    needed = method.replaces_optimizer or process_set.size() > 1 or is_elastic()
    if process_set.included() and needed:
        return _watched(HorovodTorchTransport(prefix, process_set, timeout))
    return None


def reopened(transport: Any) -> Transport:
    """A transport between Horovod's present ranks, with the names of a former one."""
    return _watched(type(transport)(transport.prefix, None, transport.timeout))


def _watched(transport: Transport) -> Transport:
    import horovod.torch as hvd

    from ef_horovod.transports.timeouts.ending import watch_over

    watch_over(transport, hvd.shutdown)
    return transport
