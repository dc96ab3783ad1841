"""Error feedback for PyTorch on stock Horovod.

    import horovod.torch as hvd
    import ef_horovod.torch as ef

    hvd.init()
    optimizer = ef.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(),
                                        compression=ef.EF21(ef.TopK(ratio=0.01)))

The whole core (`ef.TopK`, `ef.EF21`, `ef.simulate`, ...) is available here too.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import ef_horovod as _core
from ef_horovod.common import openmpi
from ef_horovod.common.extras import explained
from ef_horovod.training.policies import by_name, dense_below, dense_unless_smaller
from ef_horovod.training.policy import small_or_vector
from ef_horovod.training.saving import load, save

with explained("ef_horovod.torch"):
    from ef_horovod.torch.ddp import ddp_hook
    from ef_horovod.torch.estimation import EstimatedGradient
    from ef_horovod.torch.log import TrainingLog
    from ef_horovod.torch.optimizer import DistributedOptimizer
    from ef_horovod.torch.sync import require_in_sync
    from ef_horovod.torch.updates import CompressedUpdates
    from ef_horovod.transports.torch_distributed import TorchDistributed

if TYPE_CHECKING:
    from ef_horovod.torch.compression import Compression

if sys.modules.get("horovod.torch") is not None:
    import ef_horovod.transports.horovod_torch  # so that hvd.join() is refused from now on
openmpi.set_prefix()  # before hvd.init(): without mpirun it would not find Open MPI's files

__all__ = [
    "CompressedUpdates",
    "Compression",
    "DistributedOptimizer",
    "EstimatedGradient",
    "TorchDistributed",
    "TrainingLog",
    "by_name",
    "ddp_hook",
    "dense_below",
    "dense_unless_smaller",
    "load",
    "require_in_sync",
    "save",
    "small_or_vector",
    *_core.__all__,
]


def __getattr__(name: str) -> Any:
    if name == "Compression":  # the one that needs Horovod to be imported
        with explained("ef_horovod.torch.Compression"):
            from ef_horovod.torch.compression import Compression

        globals()[name] = Compression
        return Compression
    if name not in _core.__all__:
        raise AttributeError(f"module 'ef_horovod.torch' has no attribute {name!r}")
    return getattr(_core, name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
