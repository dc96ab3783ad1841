"""Training with a server that is interrupted and goes on.

Arguments: "whole" (all steps), "first" (to a checkpoint in the middle), "second" (from there on),
or "killed" (worker 1 is killed in the middle, after a checkpoint); a method, or "all" for one job
after the other; and the folder for states.
"""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path

import numpy as np
from common import ARGUMENTS, report
from meeting import meet
from same_gradients import digest

import ef_horovod as ef
from ef_horovod.server import ServerTransport, Worker

SHAPES = {"a": (40, 30), "b": (30,), "c": (30, 50), "d": (50, 31)}
STEPS, MIDDLE = 12, 6
METHODS = {
    "doublesqueeze": ef.DoubleSqueeze(ef.TopK(0.05), ef.OneBit()),
    "ef21": ef.EF21(ef.TopK(0.1), momentum=0.5, server_compressor=ef.TopK(0.1)),
    "ecx": ef.ErrorCompensatedX(ef.OneBit(), server_compressor=ef.RandomK(0.2), alpha=0.5),
    "ef21+": ef.EF21Plus(ef.TopK(0.1)),
}


def gradients(rank, step, attempt):
    rng = np.random.default_rng((rank, step))
    found = {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
    if step == MIDDLE and attempt == 0:  # the last thing before the checkpoint is a dropped step
        found["c" if rank else "b"][0] = np.nan
    return found


def run(worker, x, until, stop_before_good=False):
    attempt = 0
    while worker.step < until:
        directions = worker.push_pull(gradients(worker.rank, worker.step, attempt))
        attempt += 1
        if directions is not None:
            x, attempt = {name: x[name] - directions[name] for name in x}, 0
        elif stop_before_good:
            break
    return x


def run_phase(phase, method, kept):
    """One job; where it leads, and this worker's rank."""
    transport = ServerTransport()
    rank, kept = transport.rank, kept / f"worker{transport.rank}.pickle"
    x, state = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}, None
    if phase == "second":
        x, state = pickle.loads(kept.read_bytes())
    with Worker(x, METHODS[method], bucket_bytes=1, state=state, transport=transport) as worker:
        if phase == "second":
            x = run_good(worker, x, worker.step + 1)
        else:
            x = run(worker, x, STEPS, stop_before_good=True)
            kept.parent.mkdir(exist_ok=True)
            kept.write_bytes(pickle.dumps((x, worker.checkpoint())))
        if phase == "killed" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if phase != "first":
            x = run(worker, x, STEPS) if phase != "whole" else run_good(worker, x)
    return rank, {name: digest(value) for name, value in x.items()}


def main() -> None:
    phase, method, folder = ARGUMENTS[0], ARGUMENTS[1], Path(ARGUMENTS[2])
    if method != "all":
        return report(*run_phase(phase, method, folder))
    meet()
    ends = {}
    for one in METHODS:
        rank, ends[one] = run_phase(phase, one, folder / one)
    report(rank, ends)


def run_good(worker, x, until=STEPS):
    """On from a dropped step, whose gradients are good now."""
    directions = worker.push_pull(gradients(worker.rank, worker.step, 1))
    return run(worker, {name: x[name] - directions[name] for name in x}, until)


main()
