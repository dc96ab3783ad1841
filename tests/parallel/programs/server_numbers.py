"""Steps of methods through parameter servers; where they lead, as digests.

The models of `doublesqueeze_oracle.py` are trained; with the argument "every", one channel of every
method x compressor takes steps as well, all of them under way at once; with "torch", on tensors.
"""

from __future__ import annotations

import numpy as np
from common import ARGUMENTS, report
from doublesqueeze_oracle import SHAPES, TRAININGS, gradients_of
from same_gradients import SEED, SHAPE, STEPS, digest, gradient

from ef_horovod.buckets import plan_buckets
from ef_horovod.channel import Channel, finish_step
from ef_horovod.policy import small_or_vector
from ef_horovod.server import ServerTransport
from ef_horovod.testing.pairs import every_method


def open_every(transport):
    zeros = np.zeros(SHAPE, np.float32).reshape(-1)
    if "torch" in ARGUMENTS:
        import torch

        zeros = torch.from_numpy(zeros)
    return {
        f"x{i} by {method}": Channel(
            f"x{i}", zeros, method.for_shapes([SHAPE]), transport, exchange="server", seed=SEED
        )
        for i, method in enumerate(every_method())
    }


def run_every(channels, rank):
    x = {name: 0 for name in channels}
    for step in range(STEPS):
        for channel in channels.values():
            np.asarray(channel.gradient)[:] = gradient(rank, step).reshape(-1)
            channel.start(step)
        for name, channel in channels.items():
            (direction,) = finish_step([channel])
            x[name] = x[name] - np.asarray(direction)
    return {name: digest(value) for name, value in x.items()}


def open_training(training, transport):
    """(channel, slots) of each bucket: one parameter a bucket, names that no other training has."""
    named = [(key, np.zeros(shape, np.float32)) for key, shape in SHAPES.items()]
    plans = plan_buckets(
        named,
        training.method,
        dense=small_or_vector,
        bucket_bytes=1,
        device_of=lambda array: None,
    )
    return [
        (
            plan._replace(name=f"{training.method} {plan.name}").open(
                np.zeros(plan.length, np.float32), transport, exchange="server"
            ),
            plan.slots,
        )
        for plan in plans
    ]


def run_training(training, buckets, rank):
    x = {key: np.zeros(shape, np.float32) for key, shape in SHAPES.items()}
    for step in range(training.steps):
        gradients = gradients_of(rank, step, x)
        for channel, (slot,) in buckets:
            channel.gradient[:] = gradients[slot.name].reshape(-1)
            channel.start(step)
        directions = finish_step([channel for channel, _ in buckets])
        for direction, (_, (slot,)) in zip(directions, buckets, strict=True):
            part = direction.reshape(SHAPES[slot.name])
            x[slot.name] = x[slot.name] - training.rate * part
    return {key: digest(value) for key, value in x.items()}


def main() -> None:
    transport = ServerTransport()
    buckets = {name: open_training(training, transport) for name, training in TRAININGS.items()}
    channels = open_every(transport) if "every" in ARGUMENTS else {}
    ends = {
        name: run_training(training, buckets[name], transport.rank)
        for name, training in TRAININGS.items()
    }
    report(transport.rank, {"every": run_every(channels, transport.rank), **ends})


main()
