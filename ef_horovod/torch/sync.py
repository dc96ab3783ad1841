"""Checks that all ranks' parameters are equal: before the first update, and later ever rarer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ef_horovod.errors import UnsupportedError
from ef_horovod.torch.parameters import tensors_of
from ef_horovod.training.in_sync import digest_of, require_equal
from ef_horovod.transports.base import Transport
from ef_horovod.transports.torch_distributed import TorchDistributed

_BY_BROADCAST = (
    "call hvd.broadcast_optimizer_state(optimizer, root_rank=0) and then "
    "hvd.broadcast_parameters(model.state_dict(), root_rank=0), state first, parameters last "
    "(Horovod takes a step on ranks without a state, and with weight decay that moves the "
    "parameters), also after hvd.join(), in which ranks miss steps; give all ranks the same "
    "learning rate; and between local steps call optimizer.exchange() first"
)
_BY_TORCH = (
    "give all ranks the same first values by torch.manual_seed(seed) or "
    "torch.distributed.broadcast(parameter.data, 0), and the same learning rate, optimizer state "
    "and number of steps"
)
_BY_SEED = (
    "give all workers the same first values by torch.manual_seed(seed) or a file, and the same "
    "learning rate and optimizer state"
)


def require_in_sync(
    parameters: Any, timeout: float | None = None, *, process_set: Any = None, transport: Any = None
) -> None:
    """Raise on all ranks unless the parameters are bitwise equal on all of them; collective.

    `ef.DistributedOptimizer` and `ef.Compression` do this themselves; see `check_sync`.

    Args:
        parameters: `model.parameters()`, `model.state_dict()`, the model, or any tensors, in the
            same order on all ranks.
        timeout: seconds to wait for other ranks; default $EF_HOROVOD_TIMEOUT or 300.
        process_set: Horovod process set to compare within; default all ranks.

        transport: an `ef.TorchDistributed`, to compare over `torch.distributed`.

    Raises:
        OutOfSyncError: parameters differ; the message names two ranks and likely reasons.
        UnsupportedError: Horovod is not initialised, as in a job with parameter servers.

    Example:
        ef.require_in_sync(model.parameters())
    """
    if isinstance(transport, TorchDistributed):
        _compare(tensors_of(parameters), transport, "digest")
        return
    import horovod.torch as hvd

    from ef_horovod.transports.horovod_torch import HorovodTorchTransport

    if not hvd.is_initialized():
        raise UnsupportedError(
            "got ef.require_in_sync without an initialised Horovod, expected hvd.init() before it; "
            "in a job with parameter servers leave it out: workers are compared by the optimizer"
        )
    tensors = tensors_of(parameters)
    process_set = process_set or hvd.global_process_set
    if process_set.included():
        _compare(tensors, HorovodTorchTransport("ef.sync", process_set, timeout), "digest")


class SyncCheck:
    """Compares ranks' parameters before the first update, then in calls 2, 4, 8 and so on.

    The second call detects ranks that began with different learning rates or optimizer states.
    Later calls detect later differences, such as after a warm-up from 0, at falling cost.

    Args:
        parameters: in the same order on all ranks.
        transport: to the other ranks.
        enabled: False to do nothing.
        constant: parameters that no step changes; compared only in the first call.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        transport: Transport,
        enabled: bool,
        constant: Sequence[torch.Tensor] = (),
    ) -> None:
        self._parameters, self._transport, self._enabled = parameters, transport, enabled
        self._constant = constant
        self._calls = 0

    def check(self, *, again: bool = True) -> None:
        """Compare if a check is due; collective. Without `again`, only the first call compares.

        Raises:
            OutOfSyncError: on all ranks, if parameters differ.
        """
        self._calls += 1
        due = self._calls & (self._calls - 1) == 0 if again else self._calls == 1
        if self._enabled and due:
            constant = self._constant if self._calls == 1 else ()
            _compare([*self._parameters, *constant], self._transport, "sync")


def _compare(parameters: Iterable[torch.Tensor], transport: Transport, name: str) -> None:
    if transport.size > 1:
        digests = transport.allgather(name, digest_of(_bits(p) for p in parameters))()
        by = _BY_TORCH if isinstance(transport, TorchDistributed) else _BY_BROADCAST
        require_equal(digests, _BY_SEED if transport.has_server else by)


def _bits(tensor: torch.Tensor) -> Any:
    """uint8[m], because NumPy lacks some of torch's dtypes."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
