"""Four workers, one of them slow; what each applied and still remembers. Argument: steps."""

from __future__ import annotations

import time

import numpy as np
from common import ARGUMENTS, report
from same_gradients import digest

import ef_horovod as ef
from ef_horovod.server import Worker

SHAPES = {"w": (40, 50), "b": (50,)}
NAP = 0.4


def main() -> None:
    steps = int(ARGUMENTS[0])
    zeros = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    worker = Worker(zeros, ef.ErrorFeedback(ef.TopK(ratio=0.05)))
    given, applied = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    rounds, pushes = [], 0
    begin = time.monotonic()
    while worker.step < steps:
        rng = np.random.default_rng((worker.rank, pushes))
        time.sleep(NAP if worker.rank == 3 else NAP / 8)
        gradients = {name: 1.0 * rng.integers(-9, 9, shape) for name, shape in SHAPES.items()}
        for name, gradient in gradients.items():
            given[name] += gradient
        pushes += 1
        for directions in worker.rounds(gradients):
            for name, direction in directions.items():
                applied[name] += direction
            rounds.append(digest(np.concatenate([d.reshape(-1) for d in directions.values()])))
    seconds = time.monotonic() - begin
    errors = worker.state_dict()["parameters"]["w"]["worker.error"].reshape(SHAPES["w"])
    report(
        worker.rank,
        {
            "rounds": rounds,
            "pushes": pushes,
            "seconds": seconds,
            "given": {name: value.tolist() for name, value in given.items()},
            "applied": {name: value.tolist() for name, value in applied.items()},
            "error": errors.tolist(),
            "refused": worker_refuses_push_pull(worker, gradients),
        },
    )


def worker_refuses_push_pull(worker, gradients):
    try:
        worker.push_pull(gradients)
    except ef.UnsupportedError as error:
        return str(error)
    return ""


main()
