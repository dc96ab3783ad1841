"""The transport over torch.distributed among real ranks of torchrun, and a channel on it."""

from __future__ import annotations

import os
import sys
import time

import numpy as np
import torch
from common import error_of, report
from torch import distributed

import ef_horovod as ef
from ef_horovod.exchange.channel import finish_step
from ef_horovod.exchange.config_check import require_same_config
from ef_horovod.training.choice import choose
from ef_horovod.transports.torch_distributed import TorchDistributed

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def unequal_sizes(transport):
    """Three steps; the second has longer buffers."""
    found = []
    for step in range(3):
        own = np.arange(3 * RANK + 1 + 10 * (step == 1), dtype=np.uint8)
        measure = lambda data: data.size  # noqa: E731
        found.append([part.tolist() for part in transport.allgather("unequal", own, measure)()])
    return found


def all_to_all(transport):
    parts = [np.full(rank + 1, 10 * RANK + rank, np.uint8) for rank in range(SIZE)]
    return [part.tolist() for part in transport.alltoall("parts", parts)()]


def sums(transport):
    values = np.random.default_rng(RANK).standard_normal(1001).astype(np.float32)
    everyone = [np.random.default_rng(r).standard_normal(1001) for r in range(SIZE)]
    total = transport.allreduce("sum", values)()
    again = transport.allreduce("sum", torch.full((1001,), float(RANK)))()
    return {
        "error": float(np.abs(total - sum(everyone)).max()),
        "bytes": total.tobytes().hex(),
        "again": again[:2].tolist(),
        "half": error_of(lambda: transport.allreduce("h", np.ones(2, np.float16))),
        "unequal": error_of(lambda: transport.allreduce("u", np.ones(2 + RANK, np.float32))()),
    }


def training(transport, exchange, ranks_per_node=1):
    """A channel on a quadratic: what `ef.simulate` computes in one process."""
    targets = np.random.default_rng(3).integers(-9, 9, (SIZE, 300)).astype(np.float32)
    method, x = ef.ErrorFeedback(ef.TopK(ratio=0.1)), np.zeros(300, np.float32)
    channel = choose(exchange, method).open("", x, method, transport, seed=11)
    for step in range(40):
        channel.gradient[:] = x - targets[RANK]
        channel.start(step)
        (direction,) = finish_step([channel])
        x = x - np.float32(0.25) * direction
    run = ef.simulate(
        method,
        lambda i, x, step: x - targets[i],
        np.zeros(300, np.float32),
        workers=SIZE,
        steps=40,
        step_size=np.float32(0.25),
        seed=11,
        exchange=exchange,
        ranks_per_node=ranks_per_node,
    )
    return {
        "bytes": x.tobytes().hex(),
        "difference": float(np.abs(x - run.x).max()),
        "sent": channel.stats().bytes_out,
    }


def disagreements(transport):
    names = ["first", "second"][:: 1 if RANK else -1]
    return {
        "order": error_of(lambda: transport.barrier(names[0])),
        "config": error_of(lambda: require_same_config(transport, [f"mine {RANK // 2}"], "g")),
    }


def missing_rank():
    transport = TorchDistributed(timeout=1.5)
    begin = time.monotonic()
    found = error_of(lambda: transport.barrier("late")) if RANK else ""
    return found, time.monotonic() - begin


if __name__ == "__main__":
    before = error_of(TorchDistributed)
    distributed.init_process_group("gloo")
    everyone = TorchDistributed(timeout=30)
    facts = {
        "before": before,
        "sizes": unequal_sizes(everyone),
        "parts": all_to_all(everyone),
        "sums": sums(everyone),
        "gather": training(everyone, "gather"),
        "double_pass": training(everyone, "double_pass"),
        "disagreements": disagreements(everyone),
    }
    os.environ["GROUP_RANK"] = str(RANK // 2)
    facts["hierarchical"] = training(TorchDistributed(), "hierarchical:gather", 2)
    facts["missing"] = missing_rank()
    facts["horovod"] = any(name.split(".")[0] == "horovod" for name in sys.modules)
    report(RANK, facts)
    distributed.barrier()
    distributed.destroy_process_group()
