"""One rank of a job that `benchmarks/bandwidth.py` starts on the hosts of a virtual cluster.

    mpirun -np 4 -H node1:1,... python benchmarks/bandwidth_rank.py JOB.json

The job says what to measure, one configuration after the other; links get their rate in between.
The first rank that trains writes a JSON line when it begins one, and one with the result. Ranks
agree on numbers of steps, and meet, by mpi4py, which has no part in the steps themselves.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # for experiments/

import numpy as np
from bandwidth_plan import MODELS, Budget, Case, epoch_seconds, warm_up

from ef_horovod.common import openmpi
from virtual_cluster.network import change_rate, counters

openmpi.set_prefix()
from mpi4py import MPI  # noqa: E402 - importing it starts MPI

_PHASES = ("seconds_compress", "seconds_wait", "seconds_decompress")
_IDLE_SECONDS = 0.5
_SEGMENT_NBYTES = 1448  # data of a packet of 1500 bytes, with IPv4, TCP and time stamps


def main(file: str) -> None:
    """Measure all cases of a job."""
    job = json.loads(Path(file).read_text())
    serves = job["group"] == "server" and MPI.COMM_WORLD.rank == 0
    peers = MPI.COMM_WORLD.Split(int(serves), MPI.COMM_WORLD.rank)
    budget = Budget(**job["budget"])
    make = None if serves else _maker(job["group"], peers, job["data"])
    for words in job["cases"]:
        case = Case(*words)
        change_rate(case.rate)
        MPI.COMM_WORLD.Barrier()
        if serves:
            from ef_horovod.server import Server

            Server().run()
            continue
        _say(job["out"], peers, {"begin": case})
        training = make(case)
        row = measure(training, case, peers, budget)
        training.close()
        _say(job["out"], peers, row)
    MPI.COMM_WORLD.Barrier()


def _maker(group: str, peers: Any, data: str | None) -> Callable[[Case], Any]:
    """What makes a training of a case, for a group."""
    if group == "tensorflow":
        from bandwidth_tensorflow import Trainings
    else:
        from bandwidth_torch import Trainings
    trainings = Trainings(group, peers, data)
    return trainings.make


def _say(out: str, peers: Any, line: dict[str, Any]) -> None:
    if peers.rank == 0:
        with open(out, "a") as file:
            file.write(json.dumps(line) + "\n")


def measure(training: Any, case: Case, peers: Any, budget: Budget) -> dict[str, Any]:
    """Time steps until the budget is spent; the row."""
    guess = case.step_seconds()
    for _ in range(warm_up(case.way, guess)):
        last = _timed(training.step)
    steps = budget.steps(peers.allreduce(last, MPI.MAX))
    peers.Barrier()
    sent, phases = training.sent(), training.phases()
    before, resent = counters("self").payload_out, _resent_bytes()
    begin = time.perf_counter()
    times = [_timed(training.step) for _ in range(steps)]
    seconds = time.perf_counter() - begin
    wire, resent = counters("self").payload_out - before, _resent_bytes() - resent
    counted, after = training.sent(), training.phases()
    control = _idle_bytes(peers) / _IDLE_SECONDS * seconds
    slowest = np.max(peers.allgather(times), axis=0)
    numbers = [(counted - sent) / steps if counted is not None else 0.0, wire / steps]
    numbers += [
        control / steps,
        resent / steps,
        *((b - a) / steps for a, b in zip(phases, after, strict=True)),
    ]
    means = np.mean(peers.allgather(numbers), axis=0)
    row = _row(case, slowest, training)
    row |= {"stats_bytes": means[0] if counted is not None else None}
    row |= {"wire_bytes": means[1], "control_bytes": means[2], "resent_bytes": means[3]}
    return row | dict(zip(_PHASES, means[4:].tolist(), strict=False))


def _row(case: Case, times: np.ndarray, training: Any) -> dict[str, Any]:
    """Quantiles over steps of the slowest rank's seconds."""
    low, middle, high = np.quantile(times, (0.1, 0.5, 0.9)).tolist()
    return {
        **case._asdict(),
        "ok": True,
        "parameters": training.parameters,
        "batch": MODELS[case.model].batch,
        "data": training.data,
        "exchange": training.exchange,
        "steps": len(times),
        "median": middle,
        "p10": low,
        "p90": high,
        "epoch": epoch_seconds(case, middle),
        "load": os.getloadavg()[0],
    }


def _idle_bytes(peers: Any) -> int:
    """What a rank sends while nobody trains: Horovod's negotiation. Nobody spins meanwhile."""
    peers.Barrier()
    before = counters("self").payload_out
    time.sleep(_IDLE_SECONDS)
    return counters("self").payload_out - before


def _resent_bytes() -> int:
    """What TCP has sent a second time on this host: links with full queues drop packets."""
    rows = [line.split() for line in Path("/proc/net/snmp").read_text().splitlines()]
    names, values = (row for row in rows if row[0] == "Tcp:")
    return _SEGMENT_NBYTES * int(values[names.index("RetransSegs")])


def _timed(step: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main(sys.argv[1])
