"""Rounds of a parameter server, next to a dense Allreduce and to what the slowest link allows.

    python benchmarks/server.py                     1, 10 and 50 M parameters, 1 to 4 workers
    python benchmarks/server.py --quick             1 M parameters, 2 workers
    python benchmarks/server.py --n 1000000 --workers 4 --repeat 20 --json times.json
    OMPI_MCA_btl=self,tcp python benchmarks/server.py --quick       TCP in place of shared memory
    launch/cluster --hosts 5 --rate 100mbit -- python benchmarks/server.py \\
        --n 1000000 --workers 4 --host node1:1,node2:1,node3:1,node4:1,node5:1     a slow network

Each number of workers and parameters is one MPI job with one server. Rounds and Allreduces of the
same gradient take turns, so that a slow moment of the machine meets both; the time is that of the
slowest worker, and medians are shown. A round begins with the workers' gradients and ends with
their directions, compression included. The bound is that of the server's link, in its busier
direction: bytes of all workers over the bandwidth that one large message from rank 0 to rank 1 had
in the same job. One worker has nobody to add to, so its Allreduce is a copy.

The second table is what a server computes in a round, without MPI: time of its core (not of the
clock on the wall, so other jobs count less), in passes over the model: one is what numpy needs for
`x += y`, which reads two vectors and writes one, as a server with an error memory has to.
`decode` is adding all workers' messages to a vector, one after the other; `reduce`, which does that
part by part in the cache, may take 3 passes more. `checks` are headers and checksums of what comes
in and goes out.
"""

from __future__ import annotations

import os

# One thread: these are read when the libraries below are imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["NUMBA_NUM_THREADS"] = "1"

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

import ef_horovod as ef
from ef_horovod.compressors.base import Payload
from ef_horovod.methods.parsing import write_method
from ef_horovod.server.launch import make_parser as launcher
from ef_horovod.server.launch import mpirun
from ef_horovod.server.plan import BucketSpec
from ef_horovod.server.protocol import Kind, Message, pack, unpack
from ef_horovod.server.rounds import ServedBucket

METHODS: dict[str, ef.Method] = {
    "uncompressed": ef.NoFeedback(ef.Identity()),
    "DoubleSqueeze(OneBit)": ef.DoubleSqueeze(ef.OneBit(), server_compressor=ef.OneBit()),
    "DoubleSqueeze(TopK(0.01))": ef.DoubleSqueeze(
        ef.TopK(ratio=0.01), server_compressor=ef.TopK(ratio=0.01)
    ),
}
LAYER = 1_000_000  # parameters are arrays of at most so many, as those of a model are
SHORT = 10_000_000  # parameters; of rounds of fewer, more are computed
WARM_UP = 2  # rounds that are not counted
PASSES = 3.0  # limit of what a server computes beside decoding
BAR = "{l_bar}{bar}| {elapsed}, {remaining} left"
JOB_SECONDS = 1800  # limit of one MPI job


class Rounds(NamedTuple):
    """Rounds of one method in one job; medians of seconds, bytes of one worker in a round."""

    n: int
    workers: int
    method: str
    round: float
    allreduce: float
    bandwidth: float  # bytes per second
    bytes_up: float
    bytes_down: float

    @property
    def bound(self) -> float:
        """Seconds that the server's link takes at least."""
        return self.workers * max(self.bytes_up, self.bytes_down) / self.bandwidth


class Computing(NamedTuple):
    """What a server computes in a round; medians of seconds of its core."""

    n: int
    workers: int
    method: str
    one: float  # pass
    reduce: float
    decode: float
    checks: float

    @property
    def passes(self) -> float:
        """Of `reduce`, beside decoding."""
        return (self.reduce - self.decode) / self.one


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [1_000_000, 10_000_000, 50_000_000]
    parser.add_argument("--n", type=int, nargs="+", default=sizes, help="parameters")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument(
        "--repeat", type=int, default=9, help="rounds to take medians of (more of short ones)"
    )
    parser.add_argument("--quick", action="store_true", help="1 M parameters, 2 workers, 5 rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times here")
    parser.add_argument("--check", action="store_true", help="fail if the limit is missed")
    parser.add_argument("-H", "--host", metavar="A:1,B:1", help="hosts, the server's first")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # a rank; writes its rows here
    options = parser.parse_args(words)
    if options.quick:
        options.n, options.workers, options.repeat = [1_000_000], [2], 5
    return options


# --- one rank of an MPI job --------------------------------------------------------------------


def run_rank(n: int, repeat: int, out: Path) -> None:
    """Rank 0 is the server, all others are workers; worker 0 writes the rows."""
    from ef_horovod.common import openmpi

    openmpi.set_prefix()
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    peers = world.Split(min(world.rank, 1), world.rank)
    bandwidth = measure_link(world, n, repeat)
    rows = []
    for name, method in METHODS.items():
        if world.rank == 0:
            serve()
        else:
            rows.append(Rounds(n, peers.size, name, *train(method, n, repeat, peers, bandwidth)))
    if world.rank == 1:
        out.write_text(json.dumps([row._asdict() for row in rows]))


def measure_link(world: Any, n: int, repeat: int) -> float:
    """Bytes per second of one message of the dense gradient's size, from rank 0 to rank 1."""
    from mpi4py import MPI

    data, times = np.ones(4 * n, np.uint8), []
    for _ in range(WARM_UP + repeat):
        if world.rank == 0:
            begin = time.perf_counter()
            world.Send([data, MPI.BYTE], 1)
            world.Recv([data[:1], MPI.BYTE], 1)
            times.append(time.perf_counter() - begin)
        elif world.rank == 1:
            world.Recv([data, MPI.BYTE], 0)
            world.Send([data[:1], MPI.BYTE], 0)
    waiting = world.Ibarrier()  # a blocking one would take the core of those who measure
    while not waiting.Test():
        time.sleep(1e-3)
    bandwidth = np.array([data.size / median(times[WARM_UP:]) if times else 0.0])
    world.Bcast(bandwidth, 0)
    return float(bandwidth[0])


def serve() -> None:
    from ef_horovod.server import Server

    Server().run()


def train(
    method: ef.Method, n: int, repeat: int, peers: Any, bandwidth: float
) -> tuple[float, float, float, float, float]:
    """Seconds of a round and of an Allreduce, the bandwidth, bytes up and down."""
    from mpi4py import MPI

    from ef_horovod.server import Worker

    rng = np.random.default_rng(peers.rank)
    gradient = rng.standard_normal(n, np.float32)
    layers = np.split(gradient, range(LAYER, n, LAYER))
    total = np.empty_like(gradient)
    times = np.zeros((2, WARM_UP + repeat))
    with Worker(layers, method, dense=lambda name, array: False) as worker:
        steps: tuple[Callable[[], object], ...] = (
            lambda: worker.push_pull(layers),
            lambda: peers.Allreduce(gradient, total),
        )
        for turn in range(WARM_UP + repeat):
            for which, step in enumerate(steps):
                peers.Barrier()
                times[which, turn] = clock(step)
        stats = worker.stats()[-1]
        done = stats.steps
    slowest = np.empty_like(times)
    peers.Allreduce(times, slowest, MPI.MAX)
    round_, allreduce = np.median(slowest[:, WARM_UP:], axis=1).tolist()
    return round_, allreduce, bandwidth, stats.bytes_out / done, stats.bytes_in / done


# --- the server's computing --------------------------------------------------------------------


class TimedBucket(ServedBucket):
    """Keeps how long the last `reduce` took."""

    seconds = 0.0

    def _reduce(self, payloads: list[Payload]) -> tuple[Kind, np.ndarray]:
        begin = time.thread_time()
        result = super()._reduce(payloads)
        self.seconds = time.thread_time() - begin
        return result


def measure_computing(n: int, workers: int, name: str, repeat: int) -> Computing:
    """Rounds of a bucket that is the whole model, without MPI."""
    method = METHODS[name]
    bucket = TimedBucket(0, BucketSpec("model", n, write_method(method), 0), workers, 0)
    messages = [message_of(method, n, worker, workers) for worker in range(workers)]
    room, source = np.zeros(n, np.float32), np.ones(n, np.float32)
    times: list[tuple[float, ...]] = []
    for turn in range(WARM_UP + repeat * max(1, SHORT // n)):
        one = computed(lambda: np.add(room, source, out=room))
        decode = computed(lambda: [payload.add_to(room) for payload in messages])
        arriving = [
            pack(Message(Kind.PUSH, worker, step=turn, round=turn), payload.data)
            for worker, payload in enumerate(messages)
        ]
        whole = computed(lambda: serve_round(bucket, arriving))  # noqa: B023 - called at once
        times.append((one, bucket.seconds, decode, whole - bucket.seconds))
    return Computing(n, workers, name, *(median(part) for part in zip(*times[WARM_UP:])))  # noqa: B905


def message_of(method: ef.Method, n: int, worker: int, workers: int) -> Payload:
    gradient = np.random.default_rng(worker).standard_normal(n, np.float32)
    message, _ = method.push(
        method.init(gradient, workers)[0], gradient, ef.Key(rank=worker, workers=workers)
    )
    return Payload(message.data.copy())


def serve_round(bucket: ServedBucket, arriving: list[np.ndarray]) -> None:
    for worker, data in enumerate(arriving):
        bucket.accept(worker, *unpack(data))
    bucket.answer()


def clock(step: Callable[[], object], now: Callable[[], float] = time.perf_counter) -> float:
    begin = now()
    step()
    return now() - begin


def computed(step: Callable[[], object]) -> float:
    """Seconds of the core that this thread took, whoever else wanted it."""
    return clock(step, time.thread_time)


# --- all of it ---------------------------------------------------------------------------------


def measure_rounds(n: int, workers: int, repeat: int, host: str | None) -> list[Rounds]:
    """Run an MPI job; a row for each method."""
    hosts = ["-H", host] if host else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        line = mpirun(launcher().parse_args(["-w", str(workers), *hosts]))
        words = ["--n", str(n), "--repeat", str(repeat), "--job", str(out)]
        line += ["-np", str(workers + 1), sys.executable, __file__, *words]
        subprocess.run(line, check=True, timeout=JOB_SECONDS)
        return [Rounds(**row) for row in json.loads(out.read_text())]


def rounds_table(rows: Sequence[Rounds]) -> str:
    return _table(
        {
            "parameters": f"{row.n:,}",
            "workers": row.workers,
            "method": row.method,
            "MB up": f"{row.bytes_up / 1e6:.3f}",
            "MB down": f"{row.bytes_down / 1e6:.3f}",
            "rounds/s": f"{1 / row.round:.2f}",
            "Allreduce/s": f"{1 / row.allreduce:.2f}",
            "of Allreduce": f"{row.allreduce / row.round:.3f}",
            "link GB/s": f"{row.bandwidth / 1e9:.2f}",
            "bound/s": f"{1 / row.bound:.1f}",
            "of bound": f"{row.bound / row.round:.3f}",
        }
        for row in rows
    )


def computing_table(rows: Sequence[Computing]) -> str:
    return _table(
        {
            "parameters": f"{row.n:,}",
            "workers": row.workers,
            "method": row.method,
            "pass ms": f"{1e3 * row.one:.2f}",
            "reduce, passes": f"{row.reduce / row.one:.2f}",
            "decode": f"{row.decode / row.one:.2f}",
            "beside it": f"{row.passes:.2f}",
            "checks": f"{row.checks / row.one:.2f}",
        }
        for row in rows
    )


def _table(rows: Any) -> str:
    return tabulate(list(rows), headers="keys", disable_numparse=True)


def hold_limit(rows: Sequence[Computing]) -> bool:
    """Print whether the limit holds for each method and size; whether it does for all."""
    print(f"Passes of reduce beside decoding, at most {PASSES:g} allowed:")
    held = True
    for n, method in dict.fromkeys((row.n, row.method) for row in rows):
        own = [row for row in rows if (row.n, row.method) == (n, method)]
        worst = max(own, key=lambda row: row.passes)
        word = "holds" if worst.passes <= PASSES else "MISSED"
        held &= worst.passes <= PASSES
        print(f"{word:7} {worst.passes:.2f}  {method}, {n:,} parameters, {worst.workers} workers")
    return held


def main(words: Sequence[str]) -> int:
    options = parse(words)
    if options.job:
        run_rank(options.n[0], options.repeat, options.job)
        return 0
    cases = [(n, workers) for n in options.n for workers in options.workers]
    rounds, computing = [], []
    with tqdm(total=2 * sum(n for n, _ in cases), disable=None, bar_format=BAR) as bar:
        for n, workers in cases:
            bar.set_description(f"{n / 1e6:g} M, {workers} workers: jobs")
            rounds += measure_rounds(n, workers, options.repeat, options.host)
            bar.update(n)
        for n, workers in cases:
            bar.set_description(f"{n / 1e6:g} M, {workers} workers: computing")
            computing += [measure_computing(n, workers, name, options.repeat) for name in METHODS]
            bar.update(n)
    print(f"{rounds_table(rounds)}\n")
    print(f"{computing_table(computing)}\n")
    held = hold_limit(computing)
    if options.json:
        report = {
            "rounds": [row._asdict() | {"bound": row.bound} for row in rounds],
            "computing": [row._asdict() | {"passes": row.passes} for row in computing],
            "held": held,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if options.check and not held else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
