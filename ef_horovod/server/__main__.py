"""A server rank: `mpirun -np 1 python -m ef_horovod.server : -np 4 python train.py`."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ef_horovod._extras import explained
from ef_horovod.errors import EFHorovodError

if TYPE_CHECKING:  # launch/server reads options by a Python that may have no NumPy
    from ef_horovod.methods.base import Method


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until the workers have ended; the exit status."""
    from ef_horovod.transports.waiting import limit_of

    arguments = make_parser().parse_args(argv)
    try:
        method, limit = method_of(arguments), limit_of(arguments.timeout)
    except (ValueError, EFHorovodError) as error:
        print(f"ef_horovod.server: error: {error}", file=sys.stderr)
        return 2

    def say(line: str) -> None:
        print(f"ef_horovod.server: {line}", file=sys.stderr, flush=True)

    with (
        ended_after(
            limit,
            lambda: say(
                f"error: waited {limit:g} s for all ranks to start MPI; see whether a worker's "
                "program ended before it did, or raise --timeout or EF_HOROVOD_TIMEOUT"
            ),
        ),
        explained("ef_horovod.server"),
    ):
        from mpi4py import MPI
    from ef_horovod.server.server import Server

    server = None
    try:
        server = Server(
            method,
            checkpoint=arguments.checkpoint,
            quorum=arguments.quorum,
            log=arguments.log,
            timeout=arguments.timeout,
            say=say,
            leaves=True,
        )
        # mpirun ends all ranks so when one of them has died.
        why = "the server was told to end (SIGTERM): a rank has died, or the job was stopped"
        stop = server.stop
        signal.signal(signal.SIGTERM, lambda number, frame: stop(why))
        server.run()
    except Exception as error:
        if server is None:  # or it has said so itself
            say(f"error: {type(error).__name__}: {error}")
        if not isinstance(error, EFHorovodError):
            sys.excepthook(*sys.exc_info())
        MPI.COMM_WORLD.Abort(1)  # workers that hang somewhere else end, too
    return 0


@contextmanager
def ended_after(seconds: float, say: Callable[[], None]) -> Iterator[None]:
    """Kill this process if the block takes longer, by a second process.

    MPI's start waits without a limit for ranks that have ended before theirs, and meanwhile no
    thread and no signal handler of Python runs.
    """
    reading, writing = os.pipe()
    watcher = os.fork()
    if watcher == 0:
        os.close(writing)
        if not select.select([reading], [], [], seconds)[0]:
            say()
            os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)
    os.close(reading)
    try:
        yield
    finally:
        os.close(writing)  # which ends the watcher, as the end of this process would
        os.waitpid(watcher, 0)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ef_horovod.server",
        description="A parameter server rank of an MPI job. Without --method it takes the method "
        "that the workers agree about.",
    )
    parser.add_argument(
        "--method",
        metavar="M",
        help="what workers must use: a whole method, 'DoubleSqueeze(TopK(0.01), TopK(0.01))', or "
        "its name, 'doublesqueeze', with --compressor",
    )
    parser.add_argument(
        "--compressor", metavar="C", help="of the workers: 'onebit', 'topk:0.01', 'OneBit(\"l2\")'"
    )
    parser.add_argument("--down-compressor", metavar="C", help="of the server's answers")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="for this server's memories, when workers ask or the job ends with an error; workers "
        "that continue with a later step than 0 find them there",
    )
    parser.add_argument(
        "--quorum",
        type=int,
        metavar="M",
        help="make rounds of M workers' messages; those of late ones count in the next round",
    )
    parser.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="append a JSON line every ten seconds: rounds, bytes, ratios, the slowest worker",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="limit of every wait for workers ($EF_HOROVOD_TIMEOUT, or 300)",
    )
    return parser


def method_of(arguments: argparse.Namespace) -> Method | None:
    """The method that the command line asks for.

    Raises:
        ValueError, UnsupportedError: it cannot be read, or is no method.
    """
    from ef_horovod.spelling import read_compressor, read_method

    up, down = (
        read_compressor(text) if text else None
        for text in (arguments.compressor, arguments.down_compressor)
    )
    if arguments.method is None:
        if up or down:
            raise ValueError(
                "got --compressor without --method, expected both or neither; add for example "
                "--method doublesqueeze"
            )
        return None
    return read_method(arguments.method, up, down)


if __name__ == "__main__":
    sys.exit(main())
