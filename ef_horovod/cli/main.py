"""The `ef-horovod` command: one function per subcommand, each adds its own parser."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from ef_horovod.common.arguments import argument
from ef_horovod.common.progress import CommandFailed
from ef_horovod.common.registry import add_import_option, load
from ef_horovod.common.units import read_count, read_rate, read_seconds
from ef_horovod.errors import EFHorovodError
from ef_horovod.horovod_build.build import FRAMEWORKS, BuildError, Options, build_horovod


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (default: sys.argv) and run one subcommand; returns its exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except (BuildError, CommandFailed, EFHorovodError) as error:
        print(f"ef-horovod: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ef-horovod", description=__doc__.partition(":")[0])
    parser.add_argument("--version", action="version", version=f"ef-horovod {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_command in COMMANDS:
        add_command(commands)
    return parser


def _version() -> str:
    try:
        return metadata.version("ef_horovod")
    except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH, not installed
        return "(not installed)"


def _add_build_horovod(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "build-horovod",
        help="build stock Horovod for the frameworks and the MPI of this environment",
        description=(
            "Builds the unpatched Horovod release for the torch, TensorFlow and MPI of the running "
            "Python environment, keeps the wheel in a cache, installs it and checks the result "
            "with a two-rank allreduce. Horovod's own build variables (HOROVOD_GPU_OPERATIONS, "
            "HOROVOD_NCCL_HOME, HOROVOD_CUDA_HOME, HOROVOD_WITHOUT_*, ...) are passed through."
        ),
    )
    parser.add_argument(
        "--framework",
        action="append",
        choices=list(FRAMEWORKS),
        help="build for this framework only (repeatable; default: all that are installed)",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="where wheels are kept (~/.cache/ef_horovod)"
    )
    parser.add_argument(
        "--rebuild", action="store_true", help="build again even if the cache has a fitting wheel"
    )
    parser.add_argument("--jobs", type=_positive, metavar="N", help="compile N files at a time")
    parser.set_defaults(run=_run_build_horovod)


def _run_build_horovod(arguments: argparse.Namespace) -> None:
    build_horovod(
        Options(
            frameworks=tuple(arguments.framework or ()),
            cache=arguments.cache,
            rebuild=arguments.rebuild,
            jobs=arguments.jobs,
        )
    )


_MOST = 2**31 - 1  # largest number that an option takes


def _positive(text: str, most: int = _MOST) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= most:
        raise argparse.ArgumentTypeError(
            f"got {text[:80]!r}, expected an integer of 1 or more, up to {most}"
        )
    return number


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= _MOST:
        raise argparse.ArgumentTypeError(f"got {text[:80]!r}, expected a number above 0")
    return number


_LISTED = ("compressors", "methods", "exchanges")


def _add_list(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "list",
        help="tables of all compressors, methods and exchanges: bytes, guarantees, memory",
        description=(
            "Lists what the registry knows, with numbers that the classes state and the contract "
            "tests check. Packages named with --import are listed as well: those of your own, "
            "which your training script imports."
        ),
    )
    parser.add_argument("what", nargs="?", choices=_LISTED, help="one of the three (all)")
    add_import_option(parser)
    parser.add_argument(
        "--elements", type=_positive, default=1_000_000, metavar="D", help="length of a vector"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="as a page, which docs/compressors.md is"
    )
    parser.set_defaults(run=_run_list)


def _run_list(arguments: argparse.Namespace) -> None:
    from ef_horovod.cli import listing

    _load(arguments)
    chosen = (arguments.what,) if arguments.what else _LISTED
    print(listing.page(chosen, arguments.elements, markdown=arguments.markdown))


def _load(arguments: argparse.Namespace) -> None:
    """Import the modules of --import."""
    sys.path.insert(0, "")  # as `python -m` does, to find modules in the current folder
    load(arguments.modules)


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "report",
        help="tables and plots of training logs, or of what parameter servers logged",
        description=(
            "Of logs by ef.TrainingLog: prints a row for each training and writes a page that "
            "compares them, with loss against steps, bytes and time, and the compression error. Of "
            "a log by `python -m ef_horovod.server --log LOG`: prints a row for each server of the "
            "last job in it, and draws rounds and bytes over time and how long all others waited "
            "for each worker."
        ),
    )
    parser.add_argument(
        "logs", type=Path, nargs="+", metavar="LOG", help="training logs, or one of servers"
    )
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE",
        help="the page, or the image for servers (first LOG with .html or .png as its suffix)",
    )  # fmt: skip
    parser.add_argument(
        "--markdown", type=Path, metavar="DIR",
        help="of training logs: a folder with report.md and PNG images, in place of a page",
    )  # fmt: skip
    parser.set_defaults(run=_run_report)


def _run_report(arguments: argparse.Namespace) -> None:
    from ef_horovod.cli import server_report, training_report

    if training_report.are_training_logs(arguments.logs):
        training_report.report(arguments.logs, arguments.out, arguments.markdown)
    elif len(arguments.logs) > 1 or arguments.markdown:
        raise CommandFailed(
            f"{arguments.logs[0]} is no training log, expected LOGs of ef.TrainingLog; pass a "
            "server's log alone and without --markdown"
        )
    else:
        server_report.report(arguments.logs[0], arguments.out)


def _add_advise(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "advise",
        help="what each choice is predicted to cost a step, and which one to take",
        description=(
            "Predicts bytes and seconds of a training step for dense sums and for each method and "
            "exchange, from a model's size, a network and a number of workers, and says which one "
            "to take, or to stay dense. docs/cost-model.md has the formulas and how far they held."
        ),
    )
    add = parser.add_argument
    add("--parameters", type=argument(read_count), required=True, metavar="N", help="3.6M, 25000")
    add("--workers", type=_counts, required=True, metavar="N[,N...]", help="in all; 4")
    add(
        "--ranks-per-node", type=_positive, default=1, metavar="R",
        help="workers behind each link of --bandwidth (1)",
    )  # fmt: skip
    add(
        "--node-bandwidth", type=argument(read_rate), metavar="RATE",
        help="from one worker of a node to another (32gbit)",
    )  # fmt: skip
    add(
        "--bandwidth", type=argument(read_rate), required=True, metavar="RATE",
        help="100mbit, 1gbit",
    )  # fmt: skip
    add("--latency", type=argument(read_seconds), default=50e-6, metavar="TIME", help="50us")
    add("--compute", type=argument(read_seconds), metavar="TIME", help="of forward and backward")
    add("--method", action="append", default=[], help="'EF21(TopK(0.01))', ef21 (repeatable)")
    add("--compressor", action="append", default=[], help="topk:0.01: of each method (repeatable)")
    add(
        "--exchange", action="append", default=[], metavar="NAME",
        help="gather, hierarchical: compare these alone (repeatable)",
    )  # fmt: skip
    add(
        "--local-steps", type=_positive, default=1, metavar="H",
        help="steps per exchange, of ef.CompressedUpdates (1)",
    )  # fmt: skip
    add_import_option(parser)
    add(
        "--mpi", choices=("default", "ring", "ideal"), default="default",
        help="Open MPI as it comes, told to sum and gather by rings, or rings without TCP (RDMA)",
    )  # fmt: skip
    add(
        "--workers-per-core",
        type=_share,
        default=1.0,
        metavar="X",
        help="where workers share cores",
    )
    add(
        "--bucket-bytes", type=_positive, default=25 * 2**20, metavar="N",
        help="of float32 in a compressed bucket (26214400)",
    )  # fmt: skip
    add(
        "--reference", action="store_true",
        help="take the reference machine's speed, in place of measuring this one's",
    )  # fmt: skip
    add("--json", action="store_true", help="for programs")
    parser.set_defaults(run=_run_advise)


def _run_advise(arguments: argparse.Namespace) -> None:
    from ef_horovod.cli import advise
    from ef_horovod.exchange.network import WITHIN_NODE, Network
    from ef_horovod.methods.parsing import read_compressor

    _load(arguments)
    try:
        compressors = [read_compressor(text) for text in arguments.compressor]
        question = advise.Question(
            parameters=arguments.parameters,
            workers=arguments.workers,
            network=Network(
                arguments.bandwidth,
                arguments.latency,
                workers_per_node=arguments.ranks_per_node,
                within=arguments.node_bandwidth or WITHIN_NODE,
            ),
            exchanges=arguments.exchange,
            methods=advise.read_methods(arguments.method, compressors),
            compute=arguments.compute,
            software=arguments.mpi,
            bucket_bytes=arguments.bucket_bytes,
            share=max(1.0, arguments.workers_per_core),
            measured=not arguments.reference,
            local_steps=arguments.local_steps,
        )
        answers = advise.advise(question)
    except ValueError as error:
        raise CommandFailed(str(error)) from None
    print((advise.as_json if arguments.json else advise.page)(question, answers))


def _counts(text: str) -> list[int]:
    return [_positive(word, 10**6) for word in text.split(",")]


COMMANDS = (_add_build_horovod, _add_list, _add_report, _add_advise)

if __name__ == "__main__":
    sys.exit(main())
