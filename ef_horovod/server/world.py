"""Watchdog for a worker that waits in a collective of MPI.COMM_WORLD without the servers.

Servers take no part in such collectives, so the wait never ends. MPI cannot report it, and to the
servers it looks like a long validation. So a thread regularly checks the current lines of all other
threads. If one stays for the whole limit in a line that calls such a collective, the watchdog ends
the process with an error message.
"""

from __future__ import annotations

import atexit
import inspect
import linecache
import os
import re
import sys
import threading
import time
from types import FrameType
from typing import Any

from ef_horovod.transports.mpi import MPI
from ef_horovod.transports.timeouts.frames import current_frames

_CALL = re.compile(
    r"([A-Za-z_][\w.]*)\.((?:all)?gatherv?|scatterv?|alltoall[vw]?|barrier|bcast|(?:all)?reduce|"
    r"reduce_scatter(?:_block)?|(?:ex)?scan|split(?:_type)?|dup|clone|create(?:_\w+)?)\s*\(",
    re.IGNORECASE,
)


_GRACE_SECONDS = 10.0


def watch(world: Any, rank: int, limit: float) -> threading.Event:
    """Start a watchdog for waits in collectives of a communicator.

    Args:
        world: communicator of servers and workers.
        rank: this worker's number.
        limit: of such a wait, in seconds.

    Returns:
        An event that ends the watchdog.
    """
    ended = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(world, rank, limit, ended), name="ef_horovod world", daemon=True
    )
    thread.start()
    atexit.register(_stop, thread, ended)
    return ended


def _stop(thread: threading.Thread, ended: threading.Event) -> None:
    """End the watchdog before the interpreter does.

    The thread may hold the last reference to a frame that has returned. A torch tensor in it would
    be freed while the interpreter ends, which aborts the process.
    """
    ended.set()
    thread.join(_GRACE_SECONDS)


def _watch(world: Any, rank: int, limit: float, ended: threading.Event) -> None:
    since: dict[tuple[int, int, int], float] = {}  # when each thread reached its current place
    while not ended.wait(min(1.0, limit / 10)):
        now = time.monotonic()
        frames = {(i, id(f), f.f_lasti): f for i, f in current_frames().items()}
        since = {place: since.get(place, now) for place in frames}
        for place, frame in frames.items():
            if now - since[place] >= limit and (call := collective_in(frame, world)):
                _end(rank, limit, frame, call)
        frames.clear()


def collective_in(frame: FrameType, world: Any) -> str:
    """The call of a collective of `world` in a frame's current line, or ""."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    for names, method in _CALL.findall(line):
        first, *rest = names.split(".")
        found = frame.f_locals.get(first, frame.f_globals.get(first))
        for name in rest:
            found = inspect.getattr_static(found, name, None)  # runs no code
        if isinstance(found, MPI.Comm) and found == world:
            return f"{names}.{method}"
    return ""


def _end(rank: int, limit: float, frame: FrameType, call: str) -> None:
    where = f"{frame.f_code.co_filename}, line {frame.f_lineno}"
    sys.stderr.write(
        f"ef_horovod: worker {rank} waited {limit:g} s in {call}() ({where}) and ends the job: it "
        "waits for the servers too, which take no part, expected collectives among workers only; "
        "call worker.transport.barrier(name), or allgather or allreduce of worker.transport\n"
    )
    sys.stderr.flush()
    os._exit(1)  # the waiting thread cannot be interrupted
