"""Limits of waits: what is none is refused, by every way in, and not taken for the default."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest

from ef_horovod.transports.local import local_group
from ef_horovod.transports.timeouts.waiting import limit_of

NO_LIMITS = [0, -3, math.nan, True, "soon", None, [1]]


@pytest.mark.parametrize("seconds", [1, 0.5, np.float32(2), math.inf, "3", 1e300])
def test_a_positive_number_is_taken(seconds, monkeypatch):
    monkeypatch.setenv("EF_HOROVOD_TIMEOUT", "7")
    assert limit_of(seconds) == float(seconds)
    assert limit_of(None) == 7
    monkeypatch.delenv("EF_HOROVOD_TIMEOUT")
    assert limit_of(None) == 300


@pytest.mark.parametrize("seconds", NO_LIMITS)
def test_anything_else_is_refused(seconds):
    with pytest.raises(ValueError, match="expected a positive number of seconds; leave it out for"):
        local_group(1, timeout=seconds)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "soon"])
def test_so_is_what_the_environment_says(text, monkeypatch):
    monkeypatch.setenv("EF_HOROVOD_TIMEOUT", text)
    with pytest.raises(ValueError, match=f"got EF_HOROVOD_TIMEOUT='{text}', expected a positive"):
        limit_of(None)


def test_every_transport_refuses_a_limit_of_zero():
    """In a process of its own each would need ranks; all take their limit from one function."""
    import horovod.torch as hvd

    from ef_horovod.server import Server, ServerTransport
    from ef_horovod.transports.horovod_torch import HorovodTorchTransport
    from ef_horovod.transports.mpi import MPITransport

    hvd.init()
    for make in (HorovodTorchTransport, MPITransport, ServerTransport, Server):
        with pytest.raises(ValueError, match=r"got timeout=0, expected a positive number"):
            make(timeout=0)


def test_a_limit_of_infinity_is_none():
    a, b = local_group(2, timeout=math.inf)
    wait = a.allgather("x", np.ones(1, np.uint8))
    threading.Timer(0.1, lambda: b.allgather("x", np.ones(1, np.uint8))).start()
    assert len(wait()) == 2
