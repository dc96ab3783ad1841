"""Rank 1 leaves; rank 0 waits for it in a collective, then asks for another one."""

from __future__ import annotations

import horovod.torch as hvd
import numpy as np
from common import error_of, report

from ef_horovod.transports.horovod_torch import HorovodTorchTransport


def main() -> None:
    hvd.init()
    transport = HorovodTorchTransport()
    bytes_ = np.zeros(8, np.uint8)
    transport.allgather("first", bytes_)()
    if hvd.rank() == 0:
        collectives = {
            "waits": lambda: transport.allgather("second", bytes_)(),
            "allgather": lambda: transport.allgather("third", bytes_),
            "alltoall": lambda: transport.alltoall("fourth", [bytes_, bytes_]),
            "allreduce": lambda: transport.allreduce("fifth", np.zeros(8, np.float32)),
        }
        report(0, {name: error_of(action) for name, action in collectives.items()})
    else:
        report(1, {})


main()
