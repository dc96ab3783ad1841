"""Steps of methods through parameter servers; where they lead, as digests.

The models of `doublesqueeze_oracle.py` are trained, and one channel of every method x compressor
takes steps, all of them under way at once. Arguments: "all" or "sample" of these pairs; and "torch"
for tensors in one job, or "cases" and [[servers, workers, whether every method takes steps], ...],
for which the program runs on all ranks, as servers and as workers.
"""

from __future__ import annotations

import json

import numpy as np
from common import ARGUMENTS, report
from doublesqueeze_oracle import SHAPES, TRAININGS, gradients_of
from meeting import meet
from same_gradients import SEED, SHAPE, STEPS, digest, gradient, methods_of_servers

from ef_horovod.exchange.channel import finish_step
from ef_horovod.server import Server, ServerTransport
from ef_horovod.training.buckets import plan_buckets
from ef_horovod.training.choice import open_channel
from ef_horovod.training.policy import small_or_vector


def open_every(transport):
    zeros = np.zeros(SHAPE, np.float32).reshape(-1)
    if "torch" in ARGUMENTS:
        import torch

        zeros = torch.from_numpy(zeros)
    return {
        f"x{i} by {method}": open_channel(
            f"x{i}", zeros, method.for_shapes([SHAPE]), transport, exchange="server", seed=SEED
        )
        for i, method in enumerate(methods_of_servers(ARGUMENTS[0]))
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


def run_worker(transport, every):
    buckets = {name: open_training(training, transport) for name, training in TRAININGS.items()}
    channels = open_every(transport) if every else {}
    ends = {
        name: run_training(training, buckets[name], transport.rank)
        for name, training in TRAININGS.items()
    }
    return {"every": run_every(channels, transport.rank), **ends}


def run_cases(cases):
    """Jobs of all sizes, one after the other, on the first ranks of this one."""
    from mpi4py import MPI

    world, ends = MPI.COMM_WORLD, {}
    for servers, workers, every in cases:
        meet()
        comm = world.Split(0 if world.rank < servers + workers else MPI.UNDEFINED, world.rank)
        if world.rank < servers:
            Server(comm=comm, timeout=300).run()
        elif world.rank < servers + workers:
            transport = ServerTransport(300, comm)
            ends[f"{servers} {workers} {transport.rank}"] = run_worker(transport, every)
            transport.close()
    meet()
    report(world.rank, ends)


def main() -> None:
    if ARGUMENTS[1] == "cases":
        run_cases(json.loads(ARGUMENTS[2]))
    else:
        transport = ServerTransport()
        report(transport.rank, run_worker(transport, every=True))


main()
