"""The parameter server on mpi4py: both directions compressed, one or several server ranks.

    mpirun -np 1 python -m ef_horovod.server : -np 4 python train.py

In train.py, for gradients in NumPy arrays:

    from ef_horovod.server import Worker

    top = ef.TopK(ratio=0.01)
    worker = Worker(parameters, ef.DoubleSqueeze(top, server_compressor=top))
    directions = worker.push_pull(gradients)

The adapters of other frameworks send their buckets through `ServerTransport`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ef_horovod.common.extras import explained

if TYPE_CHECKING:
    from ef_horovod.server.client import ServerTransport as ServerTransport
    from ef_horovod.server.server import Server as Server
    from ef_horovod.server.worker import Worker as Worker
    from ef_horovod.training.log import TrainingLog as TrainingLog

_PLACES = {
    "Server": "server.server",
    "ServerTransport": "server.client",
    "TrainingLog": "training.log",
    "Worker": "server.worker",
}
__all__ = ["Server", "ServerTransport", "TrainingLog", "Worker"]


def __getattr__(name: str) -> Any:  # parts that need MPI or NumPy are loaded on first use
    if name not in _PLACES:
        raise AttributeError(f"module 'ef_horovod.server' has no attribute {name!r}")
    with explained("ef_horovod.server"):
        return getattr(importlib.import_module(f"ef_horovod.{_PLACES[name]}"), name)
