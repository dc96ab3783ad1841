"""Error feedback for TensorFlow and Keras on stock Horovod.

    import horovod.tensorflow as hvd
    import ef_horovod.tensorflow as ef

    hvd.init()
    optimizer = ef.DistributedOptimizer(keras.optimizers.SGD(0.1),
                                        compression=ef.EF21(ef.TopK(ratio=0.01)))

The whole core (`ef.TopK`, `ef.EF21`, `ef.simulate`, ...) is available here too.
"""

from __future__ import annotations

from typing import Any

import ef_horovod as _core
from ef_horovod.common import openmpi
from ef_horovod.common.extras import explained
from ef_horovod.training.policies import by_name, dense_below, dense_unless_smaller
from ef_horovod.training.policy import small_or_vector
from ef_horovod.training.saving import load, save

with explained("ef_horovod.tensorflow"):
    from ef_horovod.tensorflow.broadcast import broadcast_variables
    from ef_horovod.tensorflow.callback import TrainingCallback
    from ef_horovod.tensorflow.compression import Compression
    from ef_horovod.tensorflow.log import TrainingLog
    from ef_horovod.tensorflow.optimizer import DistributedOptimizer
    from ef_horovod.tensorflow.reducer import Reducer
    from ef_horovod.tensorflow.sync import require_in_sync
    from ef_horovod.tensorflow.tape import DistributedGradientTape
    from ef_horovod.tensorflow.updates import CompressedUpdates

openmpi.set_prefix()  # before hvd.init(): without mpirun it would not find Open MPI's files

__all__ = [
    "CompressedUpdates", "Compression", "DistributedGradientTape", "DistributedOptimizer",
    "Reducer", "TrainingCallback", "TrainingLog", "broadcast_variables", "by_name", "dense_below",
    "dense_unless_smaller", "load", "require_in_sync", "save", "small_or_vector",
    *_core.__all__,
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _core.__all__:
        raise AttributeError(f"module 'ef_horovod.tensorflow' has no attribute {name!r}")
    return getattr(_core, name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
