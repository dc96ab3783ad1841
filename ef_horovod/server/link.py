"""The roles of ranks in the job, and a private communicator for servers and workers.

Every rank calls `connect` once, in one program or in several (MPMD). Nothing else of ef_horovod's
server uses MPI.COMM_WORLD, so user code and Horovod can use MPI too. `connect` begins with a roll
call, which is over before it returns. If a process loads this module and ends without calling
`connect`, it still answers the roll call: that it has ended, and why.
"""

from __future__ import annotations

import atexit
import sys
from typing import Any, NamedTuple

import numpy as np

from ef_horovod.errors import ServerError, UnsupportedError
from ef_horovod.transports.mpi import MPI, communicator
from ef_horovod.transports.timeouts.waiting import wait_until

SERVER, WORKER = 0, 1
ROLES = ("server", "worker")
HINT = (  # for errors about missing workers
    "a collective on MPI.COMM_WORLD in a worker waits for the servers, too: call "
    "worker.transport.barrier(name) or the like in place of MPI.COMM_WORLD.Barrier()"
)
_ROLL_CALL = 31415  # tag on COMM_WORLD, only for the roll call
_ENDED = 255  # sent instead of a role; the reason follows, if known
_ANSWER_NBYTES = 512
opened: list[tuple[Any, Any]] = []  # communicator and transport of this process as a worker


class Group(NamedTuple):
    """This rank's place in the job."""

    comm: Any  # private communicator of all ranks
    peers: Any  # private communicator of the ranks with the same role
    servers: list[int]  # ranks in comm
    workers: list[int]  # ranks in comm
    number: int  # of this rank among ranks of its role


def require_first(comm: Any = None) -> None:
    """Raise if this process is already a worker of the job, by another optimizer or similar.

    Args:
        comm: of servers and workers; default COMM_WORLD.

    Raises:
        UnsupportedError: the process is already a worker.
    """
    if any(c == communicator(comm) for c, _ in opened):
        raise UnsupportedError(
            "got a second optimizer, reducer, tape or Worker in a job with parameter servers, "
            "expected one per process, because servers learn of all buckets at once; give all "
            "parameters to one, in parameter groups if their settings differ, and close it only "
            "after the last step, because the servers end with it"
        )


def connect(role: int, timeout: float, comm: Any = None) -> Group:
    """Meet all ranks of the job; collective over `comm`.

    Args:
        role: SERVER or WORKER.
        timeout: limit of the wait, in seconds.
        comm: of servers and workers; default COMM_WORLD.

    Raises:
        CollectiveTimeoutError: some ranks did not call this; rank 0 names them.
        UnsupportedError: there is no server or no worker.
    """
    from ef_horovod.arrays.kernels import largest

    largest(np.zeros(1, np.uint32))  # load Numba now: it takes seconds, and others would wait
    world = communicator(comm)
    _roll_call(world, role, timeout)
    private = world.Dup()
    roles = np.empty(private.Get_size(), np.int32)
    private.Allgather(np.array([role], np.int32), roles)
    servers, workers = (np.flatnonzero(roles == kind).tolist() for kind in (SERVER, WORKER))
    if not servers or not workers:
        raise UnsupportedError(
            f"got {len(servers)} servers and {len(workers)} workers in this MPI job, expected at "
            "least one of each; start it with `launch/server -s 1 -w 4 -- python train.py`, or "
            "`mpirun -np 1 python -m ef_horovod.server : -np 4 python train.py`"
        )
    peers = private.Split(role, private.Get_rank())
    return Group(private, peers, servers, workers, peers.Get_rank())


def _roll_call(world: Any, role: int, timeout: float) -> None:
    """Wait until all ranks are here, so that later collectives cannot block."""
    atexit.unregister(_say_that_it_ended)
    rank, size = world.Get_rank(), world.Get_size()
    here = np.array([role], np.uint8)
    if rank > 0:
        go = np.zeros(_ANSWER_NBYTES, np.uint8)
        requests = [world.Isend(here, 0, _ROLL_CALL), world.Irecv(go, 0, _ROLL_CALL)]
        wait_until(
            lambda: bool(MPI.Request.Testall(requests)),
            timeout,
            lambda: (
                f"{ROLES[role]} with rank {rank} waited {timeout:g} s for all {size} ranks of the "
                "job to start as server or worker; rank 0 names the missing ones, unless it is one"
            ),
        )
        _require_running(0, go)
        return
    calls = np.zeros((size, _ANSWER_NBYTES), np.uint8)
    waits = {peer: world.Irecv(calls[peer], peer, _ROLL_CALL) for peer in range(1, size)}

    def all_here() -> bool:
        for peer in [peer for peer, request in waits.items() if request.Test()]:
            del waits[peer]
            _require_running(peer, calls[peer])
        return not waits

    wait_until(
        all_here,
        timeout,
        lambda: (
            f"{ROLES[role]} with rank 0 waited {timeout:g} s for ranks {sorted(waits)} to start as "
            "server or worker; make the Worker or wrap the optimizer before data are loaded, see "
            f"whether they wait in hvd.init() or the like ({HINT}), or raise EF_HOROVOD_TIMEOUT"
        ),
    )
    for peer in range(1, size):
        world.Send(here, peer, _ROLL_CALL)


def _require_running(rank: int, answer: np.ndarray) -> None:
    if answer[0] != _ENDED:
        return
    reason = answer[1:].tobytes().rstrip(b"\0").decode(errors="ignore")
    raise ServerError(
        f"the process with rank {rank} has ended before it became a server or a worker"
        f"{reason and f' ({reason})'}, expected all ranks of the job to become one; see why it "
        "ended"
    )


@atexit.register  # runs before mpi4py ends MPI, which waits for all ranks
def _say_that_it_ended() -> None:
    """Answer the roll call; other ranks would otherwise wait until their timeout."""
    if not MPI.Is_initialized() or MPI.Is_finalized():
        return
    world = MPI.COMM_WORLD
    text = in_words(what_ends_this_process())
    words = text.encode()
    if len(words) >= _ANSWER_NBYTES:
        words = words[: _ANSWER_NBYTES - 4] + b"..."
    answer = np.frombuffer(bytes([_ENDED]) + words, np.uint8)
    for peer in range(1, world.Get_size()) if world.Get_rank() == 0 else (0,):
        if peer != world.Get_rank():
            world.Isend(answer, peer, _ROLL_CALL)  # small, so no receiver is needed


def what_ends_this_process() -> BaseException | None:
    """The uncaught exception that ends the process, for exit handlers.

    None in an interactive session: there the last exception may be old.
    """
    interactive = hasattr(sys, "ps1") or sys.flags.interactive
    return None if interactive else getattr(sys, "last_value", None)


def in_words(error: BaseException | None) -> str:
    """An error as text; empty for None."""
    return "" if error is None else f"{type(error).__name__}: {error}"
