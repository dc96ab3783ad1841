"""The server of several jobs in a row on the same ranks; the next one begins after an error, too.

Arguments: how many jobs, then options of `python -m ef_horovod.server`, with {} for the number of a
job. The workers' program calls `meet` before its first job, so that no limit runs while it loads.
"""

from __future__ import annotations

import sys

from meeting import meet

from ef_horovod.errors import EFHorovodError
from ef_horovod.server import Server
from ef_horovod.server.__main__ import make_parser, method_of


def serve(words: list[str]) -> None:
    options = make_parser().parse_args(words)
    server = Server(
        method_of(options),
        checkpoint=options.checkpoint,
        quorum=options.quorum,
        log=options.log,
        timeout=options.timeout,
        say=lambda line: print(f"ef_horovod.server: {line}", file=sys.stderr, flush=True),
    )
    try:
        server.run()
    except EFHorovodError as error:
        print(f"that job has ended: {error}", flush=True)


def main() -> None:
    jobs, *words = sys.argv[1:]
    meet()
    for number in range(int(jobs)):
        serve([word.replace("{}", str(number)) for word in words])


main()
