"""A rank of benchmarks/cost_model.py: for each case the parts of a step, and its bytes.

Before each case all ranks probe at once how fast they compute, so that the speeds are those of
ranks that share the machine's cores.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch

from ef_horovod.cost.probe import measure_work
from ef_horovod.exchange.channel import Channel, finish_step
from ef_horovod.methods.parsing import read_method
from ef_horovod.training.choice import open_channel
from ef_horovod.transports.horovod_torch import HorovodTorchTransport

WARM_UP = 2


def main() -> None:
    """Arguments: folder for results, elements, repetitions, JSON of {label: [method, exchange]}."""
    hvd.init()
    torch.set_num_threads(1)
    out, *numbers = sys.argv[1:4]
    elements, repetitions = (int(number) for number in numbers)
    cases = json.loads(sys.argv[4])
    generator = torch.Generator().manual_seed(hvd.rank())
    gradient = torch.randn(elements, generator=generator)
    found = {
        label: measure(label, method, exchange, gradient, repetitions)
        for label, (method, exchange) in cases.items()
    }
    Path(out, f"rank{hvd.rank()}.json").write_text(json.dumps(found))


def measure(label: str, method: str, exchange: str, gradient: Any, repetitions: int) -> Any:
    """Medians over steps, each from a barrier on."""
    if method == "Horovod fp16":
        return measure_fp16(label, gradient, repetitions)
    hvd.barrier()
    work = measure_work(read_method(method), gradient.shape[0])
    transport = HorovodTorchTransport(label)
    channel = open_channel("x", gradient, read_method(method), transport, exchange=exchange)
    steps = [timed_step(channel, gradient, number) for number in range(WARM_UP + repetitions)]
    last = channel.stats()
    result = {part: statistics.median(s[part] for s in steps[WARM_UP:]) for part in steps[0]}
    result["least"] = min(s["step"] for s in steps[WARM_UP:])
    sent = {"bytes_out": last.bytes_out / last.steps, "bytes_in": last.bytes_in / last.steps}
    return result | sent | {"exchange": last.exchange, "work": work}


def timed_step(channel: Channel, gradient: Any, number: int) -> dict[str, float]:
    """Seconds of one step, and of its parts."""
    channel.gradient[:] = gradient
    before = vars(channel._stats).copy()
    hvd.barrier()
    begin = time.perf_counter()
    channel.start(number)
    assert finish_step([channel]) is not None
    parts = {"step": time.perf_counter() - begin}
    for part in ("seconds_compress", "seconds_wait", "seconds_decompress"):
        parts[part] = getattr(channel._stats, part) - before[part]
    return parts


def measure_fp16(label: str, gradient: Any, repetitions: int) -> dict[str, float]:
    """Horovod's own: an allreduce of 16-bit floats, cast there and back."""
    seconds = []
    for _ in range(WARM_UP + repetitions):
        hvd.barrier()
        begin = time.perf_counter()
        compressed, context = hvd.Compression.fp16.compress(gradient)
        reduced = hvd.allreduce(compressed, op=hvd.Sum, name=label)
        hvd.Compression.fp16.decompress(reduced, context)
        seconds.append(time.perf_counter() - begin)
    measured = seconds[WARM_UP:]
    return {"step": statistics.median(measured), "least": min(measured)}


main()
