"""What happens in a step, drawn: this rank's own work, and what Horovod does meanwhile.

    python benchmarks/timeline.py --out timeline              MLP, 4 hosts, 100 Mbit/s; as root
    python benchmarks/timeline.py --hosts 2 --rates 1gbit --ways "EF21 top-k" --bucket-mb 4
    python benchmarks/timeline.py --buckets 1 2 4 8 16 25 --rates 100mbit 1gbit --out buckets

The first form draws one step of each way: spans of the training on rank 0 (forward, backward,
compressing, waiting, decoding, update) above those of Horovod's own timeline (HOROVOD_TIMELINE), in
which a collective is first negotiated, from the first rank that asks until the last one has, and
then carried by MPI. Of 12 steps after a warm-up, the one of median length is shown.

The second form, with --buckets, times steps for each `bucket_bytes` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import bandwidth
from bandwidth_plan import Case
from tabulate import tabulate
from tqdm import tqdm

from ef_horovod.common.arguments import argument
from ef_horovod.common.units import read_rate, show_rate

WAYS = ["Horovod dense, ring", "EF21 top-k", "DoubleSqueeze 1 bit"]
WARM_UP, STEPS = 4, 12
LIMIT_SECONDS = 300
COLOURS = {
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "compress": "#D55E00",
    "wait": "#dddddd",
    "decompress": "#E69F00",
    "update": "#009E73",
    "negotiate": "#CC79A7",
    "carry": "#333333",
}


class Span(NamedTuple):
    """Something that took a while; seconds since the epoch."""

    kind: str  # of COLOURS
    begin: float
    end: float


# --- one rank ----------------------------------------------------------------------------------


def run_rank(file: str) -> None:
    """Train; rank 0 writes spans of all steps, or seconds of each."""
    job = json.loads(Path(file).read_text())
    from ef_horovod.common import openmpi

    openmpi.set_prefix()
    from bandwidth_torch import Trainings
    from mpi4py import MPI

    case, peers = Case(*job["case"]), MPI.COMM_WORLD
    options = {"bucket_bytes": int(job["bucket_mb"] * 2**20)} if job["bucket_mb"] else {}
    training = Trainings("ring", peers).make(case, **options)
    spans: list[Span] = []
    _record(training, spans)
    steps = []
    for _ in range(WARM_UP + job["steps"]):
        begin = time.time()
        training.step()
        steps.append((begin, time.time()))
    if peers.rank == 0:
        content = {"spans": spans, "steps": steps[WARM_UP:]}
        Path(job["out"]).write_text(json.dumps(content))
    peers.Barrier()


def _record(training: Any, spans: list[Span]) -> None:
    """Note when things begin and end in a training's steps."""
    from ef_horovod.exchange.channel import Channel

    @contextmanager
    def span(kind: str) -> Iterator[None]:
        begin = time.time()
        yield
        if kind in COLOURS:
            spans.append(Span(kind, begin, time.time()))

    timed = Channel._timed

    @contextmanager
    def timed_too(self: Channel, counter: str) -> Iterator[None]:
        with span(counter.removeprefix("seconds_")), timed(self, counter):
            yield

    Channel._timed = timed_too  # type: ignore[method-assign]
    optimizer = training.optimizer
    training.span = span
    if training.stats is None:  # Horovod's own: all of an exchange is waiting
        training.span = lambda kind: span({"exchange": "wait"}.get(kind, kind))
    training.before_step = optimizer.synchronize

    def update() -> None:
        with optimizer.skip_synchronize():
            optimizer.step()

    training.update = update


# --- all ranks ---------------------------------------------------------------------------------


def run(case: Case, bucket_mb: float | None, steps: int) -> dict[str, Any]:
    """Train on a cluster; what rank 0 wrote, with Horovod's spans.

    Raises:
        RuntimeError: the job failed, with what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="timeline-") as name:
        folder = Path(name)
        job, out, theirs = folder / "job.json", folder / "out.json", folder / "horovod.json"
        content = {"case": case, "bucket_mb": bucket_mb, "steps": steps, "out": str(out)}
        job.write_text(json.dumps(content))
        line = bandwidth.line("ring", case.hosts, case.rate, Path(__file__), ["--job", str(job)])
        environment = bandwidth.environment("ring") | {"HOROVOD_TIMELINE": str(theirs)}
        done = subprocess.run(
            line, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
        )
        if done.returncode or not out.exists():
            raise RuntimeError(f"{case.label} ended with {done.returncode}: {done.stderr[-1000:]}")
        found = json.loads(out.read_text())
        return found | {"horovod": read_horovod(theirs.read_text())}


def read_horovod(text: str) -> list[Span]:
    """Negotiations and transports of a file of Horovod's timeline.

    A tensor has a process of its own there; spans of one lie inside of each other.
    """
    spans: list[Span] = []
    start = 0.0
    open_: dict[int, list[tuple[str, float]]] = {}
    for event in json.loads(text.strip().rstrip("],\n") + "]"):  # the end may be missing
        tensor = event.get("pid", -1)
        start = event.get("args", {}).get("start_time_since_epoch_in_micros", start)
        if event.get("ph") == "B":
            open_.setdefault(tensor, []).append((event["name"], event["ts"]))
        elif event.get("ph") == "E" and open_.get(tensor):
            name, begin = open_[tensor].pop()
            kind = _kind_of(name)
            if kind:
                spans.append(Span(kind, (start + begin) / 1e6, (start + event["ts"]) / 1e6))
    return spans


def _kind_of(name: str) -> str | None:
    if name.startswith("NEGOTIATE_"):
        return "negotiate"
    return "carry" if name.startswith("MPI_") else None


def draw(found: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """One step of each way, below each other, on one time axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(found), 1, figsize=(9, 1.7 * len(found) + 0.6), squeeze=False, layout="constrained"
    )
    for (name, run_), axis in zip(found.items(), axes.flat, strict=True):
        begin, end = _typical(run_["steps"])
        ours = [Span(*span) for span in run_["spans"]]
        lanes = {"rank 0": ours, "Horovod": run_["horovod"]}
        for height, spans in enumerate(lanes.values()):
            for span in sorted(spans, key=lambda span: span.begin):  # inner ones above outer ones
                if span.end > begin and span.begin < end:
                    left = 1e3 * (max(span.begin, begin) - begin)
                    width = 1e3 * (min(span.end, end) - begin) - left
                    axis.barh(-height, width, left=left, height=0.8, color=COLOURS[span.kind])
        axis.set_yticks([0, -1], list(lanes))
        axis.set_xlim(0, 1e3 * (end - begin))
        axis.set_title(f"{name}: {1e3 * (end - begin):.0f} ms", fontsize="medium")
        axis.set_xlabel("ms")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, COLOURS, loc="outside lower center", ncols=8, fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _typical(steps: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Begin and end of the step of median length."""
    ordered = sorted((end - begin, begin, end) for begin, end in steps)
    return ordered[len(ordered) // 2][1:]


def totals(run_: dict[str, Any]) -> dict[str, str]:
    """Mean milliseconds a step of each kind of span; those of Horovod overlap the others."""
    steps = run_["steps"]
    inside = [
        Span(*span)
        for span in [*run_["spans"], *run_["horovod"]]
        if steps[0][0] <= span[1] <= steps[-1][1]
    ]
    sums = {kind: _covered([s for s in inside if s.kind == kind]) / len(steps) for kind in COLOURS}
    middle = median(end - begin for begin, end in steps)
    return {"step": f"{1e3 * middle:.1f}", **{k: f"{1e3 * v:.1f}" for k, v in sums.items()}}


def _covered(spans: Sequence[Span]) -> float:
    """Seconds in which at least one of them was going on."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.begin):
        total += max(0.0, span.end - max(span.begin, until))
        until = max(until, span.end)
    return total


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument(
        "--rates", type=argument(read_rate), nargs="+", default=[read_rate("100mbit")]
    )
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--bucket-mb", type=float, help="of the compressed ways (25)")
    parser.add_argument("--buckets", type=float, nargs="+", metavar="MB", help="time them all")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("timeline"), help="without suffix")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # a rank
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    options = parse(words)
    if options.job:
        run_rank(options.job)
        return 0
    rows, drawn = [], {}
    sizes = options.buckets or [options.bucket_mb]
    cases = [
        (Case("mlp", way, options.hosts, rate), size)
        for rate in options.rates
        for way in options.ways
        for size in sizes
    ]
    for case, size in tqdm(cases, disable=None):
        found = run(case, size, options.steps)
        drawn[case.way] = found
        shown = {"rate": show_rate(case.rate), "way": case.way, "bucket MB": size or "default"}
        rows.append(shown | totals(found))
    print(tabulate(rows, headers="keys", disable_numparse=True, tablefmt="github"))
    options.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    if not options.buckets:
        title = f"MLP, {options.hosts} hosts, {show_rate(options.rates[-1])}"
        draw(drawn, title, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
