"""One rank of a training that `benchmarks/time_to_accuracy.py` starts.

    mpirun -np 4 python benchmarks/time_to_accuracy_rank.py JOB.json

The first rank writes one JSON file: the curve of scores, or times of steps. Ranks average scores
and statistics of batch norm by mpi4py, which has no part in the steps.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # for experiments/

import torch
from time_to_accuracy_plan import TASKS, Run, Way
from time_to_accuracy_tasks import TASKS as CLASSES
from torch import nn

from ef_horovod.common import openmpi

openmpi.set_prefix()
from mpi4py import MPI  # noqa: E402 - importing it starts MPI

PEERS = MPI.COMM_WORLD
_ONE_BUCKET_MB = 1000  # PowerSGD's hook aborts with several
_FIRST_STEPS = 5  # before the timed ones
_WARM_UP = 0.2  # of the steps, while the rate rises


class Training:
    """A model, its optimizers on all ranks, and one step."""

    def __init__(self, way: Way, task: Any, lr: float, steps: int, precision: str) -> None:
        self.way, self._task, self.model = way, task, task.model()
        self._forward: nn.Module = self.model
        self._autocast = precision == "bfloat16"
        self.dense_steps = round(way.dense_part * steps)
        inner = _optimizers(way, self.model, lr, task.weight_decay)
        self._wrapped = [self._wrap(one) for one in inner]
        self._schedules = [
            torch.optim.lr_scheduler.LambdaLR(one, lambda t: _rate(t, steps))
            for one in (inner if way.carrier == "ddp" else self._wrapped)
        ]

    def _wrap(self, optimizer: torch.optim.Optimizer) -> Any:
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        named = [(name, p) for name, p in self.model.named_parameters() if p in owned]
        return _CARRIERS[self.way.carrier](self, optimizer, named)

    def step(self, batch: Any) -> None:
        """One batch."""
        self.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            loss = self._task.loss(self._forward, batch)
        loss.backward()
        clips = self._task.clip is not None and self.way.what != "momentum"
        finished = clips and self.way.what == "gradient" and self.way.carrier != "ddp"
        if finished:
            for one in self._wrapped:
                one.synchronize()
        if clips:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._task.clip)
        for one in self._wrapped:
            with one.skip_synchronize() if finished else nullcontext():
                one.step()
        for schedule in self._schedules:
            schedule.step()

    def score(self) -> float:
        """Over all ranks' parts, with the mean of all ranks' statistics of batch norm."""
        if self.way.what == "update":
            for one in self._wrapped:
                one.exchange()
        for value in self.model.buffers():
            if value.is_floating_point():
                value.copy_(torch.from_numpy(PEERS.allreduce(value.numpy()) / PEERS.size))
        self.model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            total, count = self._task.score(self.model)
        self.model.train()
        return float(PEERS.allreduce(total) / PEERS.allreduce(count))

    def sent(self) -> int | None:
        """Bytes that this rank sent so far, by `stats()`; None for other packages."""
        if self.way.carrier != "ours":
            return None
        return sum(one.stats()[-1].bytes_out for one in self._wrapped)


def _rate(step: int, steps: int) -> float:
    rising = _WARM_UP * steps
    if step < rising:
        return (step + 1) / rising
    return max(0.02, 0.5 + 0.5 * math.cos(math.pi * (step - rising) / (steps - rising)))


def _optimizers(
    way: Way, model: nn.Module, lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """What a single rank would train with; plain SGD where the method makes the updates."""
    parameters = list(model.parameters())
    if way.what == "momentum":
        return [torch.optim.SGD(parameters, lr, weight_decay=weight_decay)]
    if way.inner == "sgd":
        return [torch.optim.SGD(parameters, lr, 0.9, weight_decay=weight_decay, nesterov=True)]
    named = list(model.named_parameters()) if way.inner == "muon" else []
    matrices = [p for n, p in named if p.dim() == 2 and n.startswith("blocks")]
    known = set(matrices)
    others = [p for p in parameters if p not in known]
    adam = torch.optim.AdamW(others, lr, weight_decay=weight_decay)
    if not matrices:
        return [adam]
    like_adam: Any = {"momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    return [torch.optim.Muon(matrices, lr, weight_decay=weight_decay, **like_adam), adam]


def _horovod(training: Training, optimizer: Any, named: Any) -> Any:
    import horovod.torch as hvd

    compression = hvd.Compression.fp16 if training.way.fp16 else hvd.Compression.none
    return hvd.DistributedOptimizer(optimizer, named, compression=compression)


def _ours(training: Training, optimizer: Any, named: Any) -> Any:
    import ef_horovod.torch as ef
    from ef_horovod.methods.parsing import read_method

    way = training.way
    common: Any = {"exchange": way.exchange, "dense_steps": training.dense_steps}
    if way.vectors:
        common["dense"] = lambda name, parameter: False
    wrap: Any = ef.DistributedOptimizer
    if way.what == "update":
        wrap, common["local_steps"] = ef.CompressedUpdates, way.local_steps
    return wrap(optimizer, named, compression=read_method(way.method), **common)


def _ddp(training: Training, optimizer: Any, named: Any) -> Any:
    if training._forward is not training.model:  # another optimizer of the same model
        return optimizer
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    rank = training.way.power_rank
    size: Any = {"bucket_cap_mb": _ONE_BUCKET_MB} if rank else {}
    forward = nn.parallel.DistributedDataParallel(training.model, broadcast_buffers=False, **size)
    if rank:
        # Two dense steps come first: DDP makes its buckets anew in the second.
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=rank, start_powerSGD_iter=2
        )
        forward.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif training.way.fp16:
        forward.register_comm_hook(None, default_hooks.fp16_compress_hook)
    training._forward = forward
    return optimizer


_CARRIERS: dict[str, Callable[[Training, Any, Any], Any]] = {
    "horovod": _horovod,
    "ddp": _ddp,
    "ours": _ours,
}


def _start(carrier: str, job: dict[str, Any]) -> None:
    if carrier != "ddp":
        import horovod.torch as hvd

        hvd.init()
        return
    from torch import distributed

    store = distributed.TCPStore(job["address"], job["port"], PEERS.size, PEERS.rank == 0)
    distributed.init_process_group("gloo", store=store, rank=PEERS.rank, world_size=PEERS.size)


def train(training: Training, task: Any, epochs: int) -> dict[str, Any]:
    """The curve of scores: step, score and bytes a rank sent, after each epoch."""
    curve, begin = [], time.perf_counter()
    dense_bytes = 0
    step = 0
    for epoch in range(epochs):
        for batch in task.epoch(epoch):
            if step == training.dense_steps:
                dense_bytes = training.sent() or 0
            training.step(batch)
            step += 1
        curve.append([step, training.score(), training.sent()])
        if PEERS.rank == 0:
            print(f"epoch {epoch + 1}: {curve[-1][1]:.3f}", flush=True)
    return {
        "score": curve[-1][1],
        "curve": curve,
        "dense_steps": training.dense_steps,
        "dense_bytes": dense_bytes,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "seconds": time.perf_counter() - begin,
        "equal": _all_equal(training.model),
    }


def _all_equal(model: nn.Module) -> bool:
    """Whether all ranks have the same parameters, bit by bit."""
    import hashlib

    bits = b"".join(p.detach().contiguous().numpy().tobytes() for p in model.parameters())
    return len(set(PEERS.allgather(hashlib.sha256(bits).hexdigest()))) == 1


def time_steps(training: Training, task: Any, steps: int) -> dict[str, Any]:
    """Seconds and bytes of a step after the dense ones, and of a dense one if there are any.

    A step takes as long as its slowest rank; medians, of means over the steps of an exchange.
    """
    from virtual_cluster.network import counters

    batches, found = list(zip(range(8), task.epoch(0), strict=False)), {}
    every = training.way.local_steps
    steps = -(-steps // every) * every
    for phase in ("dense", "compressed") if training.dense_steps else ("compressed",):
        for number in range(-(-_FIRST_STEPS // every) * every):
            training.step(batches[number % 8][1])
        PEERS.Barrier()
        before, times = counters("self").payload_out, []
        for number in range(steps):
            begin = time.perf_counter()
            training.step(batches[number % 8][1])
            times.append(time.perf_counter() - begin)
        sent = counters("self").payload_out - before
        slowest = [max(row) for row in zip(*PEERS.allgather(times), strict=True)]
        means = [statistics.mean(slowest[at : at + every]) for at in range(0, steps, every)]
        found[f"{phase}_seconds"] = statistics.median(means)
        found[f"{phase}_wire_bytes"] = PEERS.allreduce(sent / steps) / PEERS.size
    return found


def main(file: str) -> None:
    """Do what a job says."""
    job = json.loads(Path(file).read_text())
    run = Run(*job["run"])
    way = TASKS[run.task].ways[run.way]
    torch.set_num_threads(1)
    _start(way.carrier, job)
    task = CLASSES[run.task](Path(job["folder"]), PEERS.rank, PEERS.size, run.seed)
    torch.manual_seed(run.seed)
    timed = job["timed_steps"]
    steps = run.epochs * task.steps
    if timed and way.dense_part:  # as many dense steps as are timed
        way = way._replace(dense_part=(timed + _FIRST_STEPS) / steps)
    training = Training(way, task, run.lr, steps, job["precision"])
    found = time_steps(training, task, timed) if timed else train(training, task, run.epochs)
    if PEERS.rank == 0:
        Path(job["out"]).write_text(json.dumps(found))
    PEERS.Barrier()


if __name__ == "__main__":
    main(sys.argv[1])
