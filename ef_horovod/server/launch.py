"""Builds and runs a job's mpirun command: servers first, then the workers' program.

python -m ef_horovod.server.launch -s 1 -w 4 -- python train.py
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ef_horovod.errors import UnsupportedError  # no import here needs NumPy: see `read`
from ef_horovod.server.__main__ import count, method_of
from ef_horovod.server.__main__ import make_parser as make_server_parser
from ef_horovod.transports.timeouts.waiting import limit_of

_LIMIT = "EF_HOROVOD_TIMEOUT"  # passed on, because ranks on other hosts have a login's variables
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
# When one rank dies, mpirun ends all others after this many seconds. A server needs them to save
# its state, or only to tell its workers the reason. mpirun always waits that long, twice, and shows
# no output of the ranks on its nodes meanwhile.
_SECONDS_TO_SAVE, _SECONDS_TO_TELL = 10, 3


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Print the mpirun command and exec it."""
    from ef_horovod.server.quorum import require_quorum  # needs NumPy, unlike `read`

    words = list(sys.argv[1:] if argv is None else argv)
    arguments, for_server, program = read(words, prog)
    options = make_server_parser().parse_args(for_server)
    try:
        method = method_of(options)
        limit_of(options.timeout)
        if options.quorum not in (None, arguments.workers):
            methods = [] if method is None else [repr(method)]
            require_quorum(options.quorum, arguments.workers, arguments.servers, methods)
    except (ValueError, UnsupportedError) as error:
        make_parser(prog).error(str(error))
    line = command(arguments, for_server, program)
    print(shlex.join(line), flush=True)
    if arguments.dry_run:
        return 0
    os.execvp(line[0], line)


def read(
    words: Sequence[str], prog: str | None = None, more: str = ""
) -> tuple[argparse.Namespace, list[str], list[str]]:
    """The launcher's options, the servers' options, and the workers' program.

    `launch/server` runs it with any Python, so that help and wrong options need no installation.

    Args:
        words: of the command line.
        prog: name of the command.
        more: text appended to the help.
    """
    parser = make_parser(prog, more)
    cut = words.index("--") if "--" in words else len(words)
    arguments, for_server = parser.parse_known_args(words[:cut])
    make_server_parser().parse_args(for_server)
    program = list(words[cut + 1 :])
    if not program:
        parser.error("got no program for the workers, expected one after --: -- python x.py")
    return arguments, for_server, program


def make_parser(prog: str | None = None, more: str = "") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog or "python -m ef_horovod.server.launch",
        description="Start servers and workers under mpirun: prints the line, then runs it.",
        epilog="Options that are not listed here go to the servers (`python -m ef_horovod.server "
        "--help`): --method, --compressor, --timeout, ... The workers' program follows after --. "
        + more,
        allow_abbrev=False,
    )
    parser.add_argument("-s", "--servers", type=count, default=1, metavar="N", help="(1)")
    parser.add_argument("-w", "--workers", type=count, required=True, metavar="N")
    parser.add_argument(
        "-H",
        "--host",
        metavar="A:2,B:2",
        help="hosts with slots; servers come to the first ones, this host before all others",
    )
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="the same in a file")
    parser.add_argument(
        "--threads",
        type=count,
        metavar="N",
        help="of a rank (here the cores divided by the ranks, on other hosts 1)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the line")
    return parser


def command(
    arguments: argparse.Namespace, for_server: Sequence[str], program: Sequence[str]
) -> list[str]:
    """The mpirun command.

    Args:
        arguments: parsed by `make_parser`.
        for_server: options of the servers.
        program: of the workers, with its arguments.
    """
    ranks, cores = arguments.servers + arguments.workers, os.cpu_count() or 1
    elsewhere = arguments.host or arguments.hostfile
    threads = arguments.threads or (1 if elsewhere else max(1, cores // ranks))
    variables = [word for name in _THREADS for word in ("-x", f"{name}={threads}")]
    options = make_server_parser().parse_args(for_server)
    if options.timeout is not None:  # workers with a shorter limit would blame the servers
        variables += ["-x", f"{_LIMIT}={options.timeout:g}"]
    elif _LIMIT in os.environ:
        variables += ["-x", _LIMIT]
    patience = _SECONDS_TO_TELL if options.checkpoint is None else _SECONDS_TO_SAVE
    line = [*mpirun(arguments), "--mca", "odls_base_sigkill_timeout", str(patience)]
    line += ["-np", str(arguments.servers), *variables]
    line += [sys.executable, "-m", "ef_horovod.server", *for_server, ":"]
    return [*line, "-np", str(arguments.workers), *variables, *program]


def mpirun(arguments: argparse.Namespace) -> list[str]:
    """mpirun with the options of all ranks, from `make_parser`'s arguments."""
    ranks, cores = arguments.servers + arguments.workers, os.cpu_count() or 1
    elsewhere = arguments.host or arguments.hostfile
    line = [_mpirun()]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        line += ["--allow-run-as-root"]  # mpirun refuses root otherwise; containers often use it
    if arguments.host:
        line += ["--host", arguments.host]
    if arguments.hostfile:
        line += ["--hostfile", str(arguments.hostfile)]
    if not elsewhere and ranks > cores:
        line += ["--oversubscribe"]
    line += ["--bind-to", "none"]  # otherwise ranks with several threads share one core
    return [*line, "--mca", "mpi_yield_when_idle", "1"]  # waiting ranks yield the core


def _mpirun() -> str:
    """mpirun beside the running Python, or the first on PATH."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun") or "mpirun"


if __name__ == "__main__":
    sys.exit(main())
