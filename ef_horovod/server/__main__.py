"""A server rank: `mpirun -np 1 python -m ef_horovod.server : -np 4 python train.py`."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ef_horovod.common.arguments import argument
from ef_horovod.common.extras import explained
from ef_horovod.common.registry import add_import_option, load
from ef_horovod.errors import EFHorovodError
from ef_horovod.transports.timeouts.waiting import limit_of, require_limit

if TYPE_CHECKING:  # launch/server reads options by a Python that may have no NumPy
    from ef_horovod.methods.base import Method


_LONGEST_SECONDS = 1e9  # 30 years; replaces an infinite limit
_MOST = 2**31 - 1  # MPI's largest number of ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until the workers have ended; returns the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        method, limit = method_of(arguments), limit_of(arguments.timeout)
        _require_writable(arguments)
    except (ValueError, EFHorovodError) as error:
        print(f"ef_horovod.server: error: {error}", file=sys.stderr)
        return 2

    def say(line: str) -> None:
        print(f"ef_horovod.server: {line}", file=sys.stderr, flush=True)

    with (
        ended_after(
            limit,
            lambda: say(
                f"error: waited {limit:g} s for all ranks to start MPI; make the Worker or wrap "
                "the optimizer before data are loaded, see whether a worker's program ended before "
                "it did, or raise --timeout or EF_HOROVOD_TIMEOUT"
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
        # mpirun sends SIGTERM to all ranks when one has died.
        why = "the server was told to end (SIGTERM): a rank has died, or the job was stopped"
        stop = server.stop
        signal.signal(signal.SIGTERM, lambda number, frame: stop(why))
        server.run()
    except Exception as error:
        if server is None:  # otherwise the server has reported it
            say(f"error: {type(error).__name__}: {error}")
        if not isinstance(error, EFHorovodError):
            sys.excepthook(*sys.exc_info())
        MPI.COMM_WORLD.Abort(1)  # also ends workers that hang elsewhere
    return 0


@contextmanager
def ended_after(seconds: float, say: Callable[[], None]) -> Iterator[None]:
    """Kill this process from a second process if the block takes longer.

    MPI's start waits without a limit for ranks that ended before starting MPI. Meanwhile no Python
    thread or signal handler runs.
    """
    reading, writing = os.pipe()
    watcher = os.fork()
    if watcher == 0:
        os.close(writing)
        if not select.select([reading], [], [], min(seconds, _LONGEST_SECONDS))[0]:
            say()
            os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)
    os.close(reading)
    try:
        yield
    finally:
        os.close(writing)  # ends the watcher, as the end of this process would
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
    parser.add_argument("--server-compressor", metavar="C", help="of the server's answers")
    add_import_option(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="for this server's error-feedback state, when workers ask or the job ends with an "
        "error; workers that continue with a later step than 0 find it there",
    )
    parser.add_argument(
        "--quorum",
        type=count,
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
        type=argument(lambda text: require_limit(text, "--timeout")),
        metavar="SECONDS",
        help="limit of what some workers have begun and others not ($EF_HOROVOD_TIMEOUT, or 300)",
    )
    return parser


def count(text: str) -> int:
    """Parse an option's number of ranks or threads."""
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number <= _MOST:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of 1 or more")
    return number


def _require_writable(arguments: argparse.Namespace) -> None:
    """Create the folders of --checkpoint and --log before training.

    Raises:
        ValueError: one is not writable.
    """
    for option, place in (("--checkpoint", arguments.checkpoint), ("--log", arguments.log)):
        if place is None:
            continue
        try:
            folder = place if option == "--checkpoint" else place.parent
            folder.mkdir(parents=True, exist_ok=True)
            if option == "--log":
                place.open("a").close()
            else:
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(
                f"got {option} {place}, which cannot be written ({error}), expected a place for "
                "this server's files; name another one"
            ) from None


def method_of(arguments: argparse.Namespace) -> Method | None:
    """The method given on the command line.

    Raises:
        ValueError, UnsupportedError: it cannot be parsed, or is not a method.
    """
    from ef_horovod.methods.parsing import read_compressor, read_method

    load(arguments.modules)
    up, down = (
        read_compressor(text) if text else None
        for text in (arguments.compressor, arguments.server_compressor)
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
