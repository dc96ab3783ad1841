"""Gathers that are longer than a 32-bit count: refused where Horovod would place them wrongly."""

from __future__ import annotations

import numpy as np
import pytest

from ef_horovod.errors import UnsupportedError

PAYLOAD = np.zeros(25_000_000, np.uint8)
REFUSED = (
    r"got 25000000 bytes to gather from each of 86 ranks for 'ef.bucket.0', expected at most "
    r"2147483647 together"
)


def test_horovods_gather_past_two_gigabytes_is_refused_before_it_starts(monkeypatch):
    import horovod.torch as hvd

    from ef_horovod.transports.horovod_torch import HorovodTorchTransport

    hvd.init()
    transport = HorovodTorchTransport()
    transport.size = 86
    monkeypatch.setattr(hvd, "allgather_async", lambda *_, **__: pytest.fail("it has started"))
    with pytest.raises(UnsupportedError, match=REFUSED):
        transport.allgather("bucket.0", PAYLOAD)
    transport.size = 85  # 2.125e9 bytes
    with pytest.raises(pytest.fail.Exception):
        transport.allgather("bucket.0", PAYLOAD)


def test_so_it_is_in_tensorflow_eager_and_in_graphs():
    import horovod.tensorflow as hvd

    from ef_horovod.transports.horovod_tensorflow import HorovodTensorFlowTransport

    hvd.init()
    transport = HorovodTensorFlowTransport()
    transport.size = 86
    for way in (transport, transport.bridge()):
        with pytest.raises(UnsupportedError, match=REFUSED):
            way.allgather("bucket.0", PAYLOAD)
