"""A worker of soak.py's job. Arguments: the job's name, rounds, seconds, a folder for results."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

import ef_horovod as ef

# One bucket each, of different lengths; the small ones stay uncompressed.
SHAPES = {"a": (120, 200), "b": (60, 100), "c": (40, 30), "d": (100,), "stop": (1,)}
WORKERS, QUORUM = 3, 2
THRESHOLD = 32  # of the mean; gradients have entries up to twice that
METHODS: dict[str, ef.Method] = {
    "all": ef.DoubleSqueeze(
        ef.HardThreshold(WORKERS * THRESHOLD), server_compressor=ef.HardThreshold(THRESHOLD)
    ),
    "quorum": ef.ErrorFeedback(ef.HardThreshold(WORKERS * THRESHOLD)),
}
SAMPLES = 200


class Sample(NamedTuple):
    """Resident memory when worker 0 had so many rounds."""

    round: int
    resident: list[int]  # bytes of each rank, server first


class Source:
    """Random gradients and delays of a worker.

    Args:
        rank: of the worker.
    """

    def __init__(self, rank: int) -> None:
        self._rng = np.random.default_rng((2026, rank))

    def gradients(self, stop: bool) -> dict[str, np.ndarray]:
        """Of one round; `stop` is told to all workers by a parameter of its own."""
        rng = self._rng
        scale = int(2 ** rng.uniform(0, 6))
        found = {
            name: WORKERS * rng.integers(-scale, scale + 1, shape).astype(np.float32)
            for name, shape in SHAPES.items()
        }
        if rng.random() < 1 / 200:
            found["abc"[rng.integers(3)]][0, 0] = np.nan
        found["stop"][:] = WORKERS * stop
        return found

    def sleep(self) -> None:
        chance = self._rng.random()
        if chance < 0.002:
            time.sleep(0.2)
        elif chance < 0.2:
            time.sleep(self._rng.uniform(0, 0.005))


def main(name: str, rounds: int, seconds: float, folder: Path) -> None:
    """Take rounds until there are enough, or some worker's time is over."""
    from ef_horovod.server import Worker  # starts MPI

    zeros = {key: np.zeros(shape) for key, shape in SHAPES.items()}
    worker = Worker(zeros, METHODS[name], bucket_bytes=1)
    source, deadline = Source(worker.rank), time.monotonic() + seconds
    given, applied = np.zeros(length()), np.zeros(length())
    samples, digests, digest, dropped, told = [], {}, 0, 0, False
    every = max(1, rounds // SAMPLES)
    while worker.step < rounds and not told:
        before = worker.step
        source.sleep()
        gradients = source.gradients(time.monotonic() > deadline)
        answers = take(worker, name, gradients)
        for turn, answer in enumerate(answers, before + 1):
            direction = flat(answer)
            applied += direction
            digest = zlib.crc32(direction, digest)
            told |= bool(answer["stop"][0] > 0)
            if turn % every == 0:
                digests[turn] = digest
        if answers:
            given += flat(counted(gradients))
        dropped += not answers
        if worker.rank == 0 and (not samples or before // every < worker.step // every):
            samples.append(Sample(worker.step, resident()))
    if worker.rank == 0:
        samples.append(Sample(worker.step, resident()))
    state = worker.checkpoint() if name == "all" else worker.state_dict()
    parts = state["parameters"]  # of those that are compressed
    errors = flat({key: parts.get(key, {}).get("worker.error", zeros[key]) for key in SHAPES})
    np.savez(folder / f"worker{worker.rank}.npz", given=given, applied=applied, errors=errors)
    rest = {"rounds": worker.step, "dropped": dropped, "digests": digests, "samples": samples}
    (folder / f"worker{worker.rank}.json").write_text(json.dumps(rest))


def take(worker: Any, name: str, gradients: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Directions of the rounds that came to pass; none if a NaN dropped the only one."""
    if name == "quorum":
        return worker.rounds(gradients)
    directions = worker.push_pull(gradients)
    return [] if directions is None else [directions]


def counted(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With a quorum, a bucket with a NaN is left out and all others count."""
    return {
        name: g if np.isfinite(g).all() else 0 * np.ones_like(g) for name, g in gradients.items()
    }


def resident() -> list[int]:
    """Bytes of each rank of this job; all are children of mpirun on this machine."""
    found = {}
    for process in psutil.Process(os.getppid()).children():
        rank = process.environ().get("OMPI_COMM_WORLD_RANK")
        if rank is not None:
            found[int(rank)] = process.memory_info().rss
    return [found[rank] for rank in sorted(found)]


def flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """float64[n] of what a parameter's name leads to."""
    return np.concatenate([np.asarray(arrays[name], float).reshape(-1) for name in SHAPES])


def length() -> int:
    return sum(math.prod(shape) for shape in SHAPES.values())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]))
