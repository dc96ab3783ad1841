"""A parameter server for 20,000 rounds: its memory and that of the workers, and no message lost.

    python benchmarks/soak.py                       both jobs, 20,000 rounds each
    python benchmarks/soak.py --quick               200 rounds each
    python benchmarks/soak.py --rounds 5000 --seconds 60 --jobs quorum --out soak

A job is one server and three workers by the launcher's mpirun line. Gradients have another random
scale in each round and on each worker, so that a hard threshold makes messages of all sizes, from a
header to the whole vector; workers sleep at random, mostly some milliseconds, at times 0.2 s. Now
and then one has a NaN. The job `all` makes rounds of all workers, by DoubleSqueeze; `quorum` makes
rounds of two workers, by ErrorFeedback, and a late worker's messages count in a later round.

Gradients are whole multiples of the number of workers, so that no sum and no mean is rounded: what
was applied and what the error memories of workers and server hold must be the sum of all gradients
to the last bit. A message that was lost, counted twice or cut off shows there.

Worker 0 reads the resident memory of all ranks from the operating system 200 times in a run; a
value in the table is the median of those in a tenth of the rounds. The status is 1 if a rank has
grown by more than the limit since a tenth of the rounds, or a number is not what it has to be. The
limit is 4 MB, 220 bytes a round. With a quorum, answers to a late worker take memory on both sides
until it reads them, and allocators keep some of it: room for those of 64 rounds comes on top. So
does room for what fills up in the first thousand rounds, in a short run. `--out NAME` writes
NAME.json and NAME.png.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from soak_worker import METHODS, QUORUM, SHAPES, WORKERS, Sample, flat
from tabulate import tabulate

from ef_horovod.methods.parsing import write_method
from ef_horovod.server.checkpoint import steps_in
from ef_horovod.server.launch import command
from ef_horovod.server.launch import make_parser as launcher
from ef_horovod.server.plan import BucketSpec
from ef_horovod.server.quorum import FARTHEST_BEHIND
from ef_horovod.server.rounds import longest_message

GROWTH_MB = 4.0  # limit of a rank, from a tenth of the rounds to the end
WARM_UP_MB = 8.0  # on top of it where a tenth of the rounds are less than WARM_UP
WARM_UP = 1000
TIMEOUT_SECONDS = 120  # of a wait in the job


class Ended(NamedTuple):
    """What a worker knows at its end."""

    rounds: int  # applied
    dropped: int  # by a NaN of any worker
    digests: dict[int, int]  # of all directions up to a round
    given: np.ndarray  # float64: the sum of the gradients that were taken
    applied: np.ndarray  # float64: the sum of the directions
    errors: np.ndarray  # float64: its error memories


class Job(NamedTuple):
    """What a job has left behind."""

    name: str
    seconds: float
    samples: list[Sample]
    workers: list[Ended]
    server_errors: np.ndarray  # float64: the server's error memories
    log: list[dict[str, Any]]  # the server's


# --- a job -------------------------------------------------------------------------------------


def run_job(name: str, rounds: int, seconds: float) -> Job:
    """One job to its end.

    Raises:
        subprocess.CalledProcessError: it ended with an error.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for_server = ["--log", str(folder / "log.jsonl"), "--timeout", str(TIMEOUT_SECONDS)]
        if name == "quorum":
            for_server += ["--quorum", str(QUORUM)]
        else:
            for_server += ["--checkpoint", str(folder / "server")]
        words = [name, str(rounds), str(seconds), place]
        program = [sys.executable, str(Path(__file__).with_name("soak_worker.py")), *words]
        line = command(launcher().parse_args(["-w", str(WORKERS)]), for_server, program)
        begin = time.monotonic()
        subprocess.run(
            line, check=True, env={**os.environ, "EF_HOROVOD_TIMEOUT": str(TIMEOUT_SECONDS)}
        )
        took = time.monotonic() - begin
        return read_job(name, took, folder)


def read_job(name: str, seconds: float, folder: Path) -> Job:
    workers, samples = [], []
    for rank in range(WORKERS):
        told = json.loads((folder / f"worker{rank}.json").read_text())
        samples = samples or [Sample(*sample) for sample in told["samples"]]
        digests = {int(turn): digest for turn, digest in told["digests"].items()}
        with np.load(folder / f"worker{rank}.npz") as sums:
            vectors = [sums[key] for key in ("given", "applied", "errors")]
        workers.append(Ended(told["rounds"], told["dropped"], digests, *vectors))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return Job(name, seconds, samples, workers, server_errors(folder / "server"), log)


def server_errors(folder: Path) -> np.ndarray:
    """What the server's last checkpoint remembers, zeros without one."""
    found = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    steps = steps_in(folder)
    for file in (folder / f"step-{steps[-1]:09d}").glob("server-*.npz") if steps else ():
        with np.load(file) as content:
            vectors = [content[key] for key in content.files if key.endswith("/error")]
        for vector in vectors:  # their lengths tell whose they are
            (name,) = [key for key, zeros in found.items() if zeros.size == vector.size]
            found[name] = vector
    return flat(found)


# --- what has to hold --------------------------------------------------------------------------


def problems(job: Job) -> list[str]:
    """What is wrong about a job's numbers, apart from memory."""
    last, end = max(job.workers, key=lambda worker: worker.rounds), job.log[-1]
    given = sum(worker.given for worker in job.workers)
    errors = sum(worker.errors for worker in job.workers)
    found = WORKERS * (last.applied + job.server_errors) + errors
    lost = np.flatnonzero(found != given)
    wrong = []
    if lost.size:
        worst = np.abs(found - given).max()
        wrong.append(f"{lost.size} of {found.size} sums differ, by up to {worst:g}")
    for rank, worker in enumerate(job.workers):
        if any(digest != last.digests.get(turn) for turn, digest in worker.digests.items()):
            wrong.append(f"worker {rank} applied other rounds than the longest list has")
    counts = {worker.rounds for worker in job.workers}
    if job.name == "all" and len(counts) > 1:
        wrong.append(f"workers have {sorted(counts)} rounds, expected one number")
    made = last.rounds + (last.dropped if job.name == "all" else 0)
    if end["round"] != made:
        wrong.append(f"the server made {end['round']} rounds and the workers saw {made}")
    if end["refused"]:
        wrong.append(f"the server refused {end['refused']} messages")
    return wrong


class Growth(NamedTuple):
    """Memory of a rank in MB, at shares of all rounds."""

    rank: str
    tenth: float
    half: float
    end: float
    bytes_a_round: float  # from the tenth on

    @property
    def mb(self) -> float:
        """From the tenth to the end."""
        return self.end - self.tenth


def growth(samples: Sequence[Sample]) -> list[Growth]:
    """How each rank's memory went."""
    last = samples[-1].round
    tenth, half, end = (memory_at(samples, share) for share in (0.1, 0.5, 1.0))
    return [
        Growth(
            f"worker {rank - 1}" if rank else "server",
            *(float(at[rank]) / 1e6 for at in (tenth, half, end)),
            float(end[rank] - tenth[rank]) / (0.9 * last),
        )
        for rank in range(1 + WORKERS)
    ]


def memory_at(samples: Sequence[Sample], share: float) -> np.ndarray:
    """Bytes of each rank: the median around a share of all rounds, for answers to a late worker
    come and go."""
    rounds = samples[-1].round
    near = [s.resident for s in samples if abs(s.round - share * rounds) <= 0.05 * rounds]
    nearest = min(samples, key=lambda s: abs(s.round - share * rounds)).resident
    return np.median(near or [nearest], axis=0)


# --- all of it ---------------------------------------------------------------------------------


def limit_mb(job: Job) -> float:
    """By how much a rank may grow."""
    late = FARTHEST_BEHIND * longest_round() / 1e6 if job.name == "quorum" else 0.0
    return GROWTH_MB + late + (WARM_UP_MB if job.samples[-1].round < 10 * WARM_UP else 0.0)


def longest_round() -> int:
    """Bytes that a worker's buffers for the answers of a round take."""
    method = write_method(METHODS["quorum"])
    return sum(
        longest_message(BucketSpec(name, math.prod(shape), method, 0))
        for name, shape in SHAPES.items()
    )


def show(job: Job, rows: Sequence[Growth]) -> None:
    columns = ("rank", "MB at 10 %", "50 %", "100 %", "growth MB", "bytes a round")
    cells = [
        (r.rank, *(f"{x:.2f}" for x in (r.tenth, r.half, r.end, r.mb)), f"{r.bytes_a_round:.1f}")
        for r in rows
    ]
    rounds = max(worker.rounds for worker in job.workers)
    dropped = sum(worker.dropped for worker in job.workers) / WORKERS
    per_round = np.mean([entry["bytes_up"] for entry in job.log]) / 1e3
    print(
        f"\n{job.name}: {rounds:,} rounds in {job.seconds:.0f} s, {dropped:g} steps dropped, "
        f"{per_round:.1f} kB a round up, {METHODS[job.name]}\n"
    )
    print(tabulate(cells, headers=columns, disable_numparse=True), flush=True)


def verdict(job: Job, rows: Sequence[Growth]) -> bool:
    """Print what holds and what does not; whether all does."""
    limit = limit_mb(job)
    worst = max(rows, key=lambda row: row.mb)
    flat_ = worst.mb <= limit
    word = "holds " if flat_ else "MISSED"
    print(f"\n{word}  memory: {worst.rank} grew most, by {worst.mb:.2f} MB, {limit:.1f} MB allowed")
    wrong = problems(job)
    for problem in wrong:
        print(f"MISSED  messages: {problem}")
    if not wrong:
        print("holds   messages: applied and remembered is what was given, to the last bit")
    return flat_ and not wrong


def draw(jobs: Sequence[Job], file: Path) -> None:
    """A panel for each job: growth of each rank's memory since a tenth of the rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(jobs), 3.5), layout="constrained")
    panels = figure.subplots(1, len(jobs), squeeze=False)[0]
    for job, panel in zip(jobs, panels, strict=True):
        rounds = [sample.round for sample in job.samples]
        for rank, row in enumerate(growth(job.samples)):
            memory = [sample.resident[rank] / 1e6 - row.tenth for sample in job.samples]
            panel.plot(rounds, memory, label=f"{row.rank}, {row.end:.0f} MB", linewidth=1.2)
        panel.axhline(limit_mb(job), color="grey", linestyle="--", linewidth=0.8)
        panel.set(title=job.name, xlabel="round", ylabel="resident MB, since a tenth of the rounds")
        panel.legend(fontsize="small")
    figure.savefig(file, dpi=120)


def record(job: Job, rows: Sequence[Growth], held: bool) -> dict[str, Any]:
    """What the JSON has of a job."""
    return {
        "job": job.name,
        "method": repr(METHODS[job.name]),
        "rounds": [worker.rounds for worker in job.workers],
        "seconds": job.seconds,
        "dropped": [worker.dropped for worker in job.workers],
        "refused": job.log[-1]["refused"],
        "limit_mb": limit_mb(job),
        "growth": [row._asdict() | {"mb": row.mb} for row in rows],
        "problems": problems(job),
        "held": held,
        "samples": job.samples,
    }


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20_000, help="of each job")
    parser.add_argument("--seconds", type=float, default=1e9, help="end a job after so many")
    parser.add_argument("--jobs", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--quick", action="store_true", help="200 rounds")
    parser.add_argument("--out", type=Path, metavar="NAME", help="write NAME.json and NAME.png")
    options = parser.parse_args(words)
    if options.quick:
        options.rounds = 200
    return options


def main(words: Sequence[str]) -> int:
    options = parse(words)
    jobs, records = [], []
    for name in options.jobs:
        job = run_job(name, options.rounds, options.seconds)
        rows = growth(job.samples)
        show(job, rows)
        jobs.append(job)
        records.append(record(job, rows, verdict(job, rows)))
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n")
        draw(jobs, options.out.with_suffix(".png"))
    return 0 if all(entry["held"] for entry in records) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
