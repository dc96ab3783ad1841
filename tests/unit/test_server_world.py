"""Whether a line calls a collective in which servers would have to take part."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

from mpi4py import MPI

from ef_horovod.server.world import _CALL, collective_in


class Comm(MPI.Intracomm):
    """A communicator whose barrier looks at the line that called it."""

    def Barrier(self) -> str:
        return collective_in(sys._getframe(1), MPI.COMM_WORLD)

    def bcast(self, x: object, root: int = 0) -> str:
        return collective_in(sys._getframe(1), MPI.COMM_WORLD)


comm, other = Comm(MPI.COMM_WORLD), Comm(MPI.COMM_SELF)


class Trainer:
    def __init__(self) -> None:
        self.comm = comm

    @property
    def mine(self) -> Comm:
        return comm

    def wait(self) -> str:
        return self.comm.Barrier()

    def wait_by_property(self) -> str:
        return self.mine.Barrier()


def test_calls_by_all_names_are_found() -> None:
    local, holder = comm, SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=comm))
    assert comm.Barrier() == "comm.Barrier"
    assert local.Barrier() == "local.Barrier"
    assert holder.MPI.COMM_WORLD.Barrier() == "holder.MPI.COMM_WORLD.Barrier"
    assert Trainer().wait() == "self.comm.Barrier"
    assert local.bcast({"x": [1, 2]}, root=0) == "local.bcast"


def test_other_communicators_and_other_calls_are_not() -> None:
    assert other.Barrier() == ""
    look = comm.Barrier
    assert look() == ""
    assert Trainer().wait_by_property() == "", "a property would have to be run to know"


def test_all_collectives_of_mpi4py_are_known_by_name() -> None:
    names = ["Barrier", "Bcast", "Gather", "Scatter", "Allgather", "Alltoall", "Reduce", "Scan"]
    names += ["Allreduce", "Exscan"]
    names += [name.lower() for name in names]
    names += ["Gatherv", "Scatterv", "Allgatherv", "Alltoallv", "Alltoallw", "Reduce_scatter"]
    names += ["Reduce_scatter_block", "Split", "Split_type", "Dup", "Clone", "Create_cart"]
    for name in names:
        assert hasattr(MPI.Intracomm, name)
        assert _CALL.findall(f"x = comm.{name}(y)") == [("comm", name)]
    for name in ("Send", "recv", "Get_rank", "Ibarrier", "Iallreduce", "Free"):
        assert not _CALL.findall(f"comm.{name}()")


def test_the_watchdog_ends_before_the_interpreter() -> None:
    """It may hold the last reference to a tensor, and must not free it later."""
    program = (
        "import atexit, threading\n"
        "atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))\n"
        "from ef_horovod.server.world import watch\n"
        "watch(None, 0, 100.0)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout == "['MainThread']\n"
