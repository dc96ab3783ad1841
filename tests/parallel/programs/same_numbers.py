"""Steps of every method x compressor x exchange on this rank; where they lead, as digests.

Arguments: "mpi" (a channel over mpi4py), "torch" or "tensorflow" (the adapters over Horovod),
"torch:cuda" for torch with its tensors on a GPU, or "distributed" (torch without Horovod); and
which cases: "all", "pairs", "singles" or "methods".
"""

from __future__ import annotations

import numpy as np
from common import ARGUMENTS, report
from same_gradients import SEED, SHAPE, STEPS, cases, dense_steps_of, digest, gradient


def over_mpi():
    from ef_horovod.exchange.channel import finish_step
    from ef_horovod.training.choice import open_channel
    from ef_horovod.transports.mpi import MPITransport

    transport = MPITransport()

    def walk(method, exchange):
        x = np.zeros(SHAPE, np.float32).reshape(-1)
        method = method.for_shapes([SHAPE])
        options = {"exchange": exchange, "seed": SEED, "dense_steps": dense_steps_of(method)}
        channel = open_channel("bucket.0", x, method, transport, **options)
        for step in range(STEPS):
            channel.gradient[:] = gradient(transport.rank, step).reshape(-1)
            channel.start(step)
            (direction,) = finish_step([channel])
            x = x - direction
        return x

    return transport.rank, walk


def with_torch(device=None):
    import horovod.torch as hvd

    hvd.init()
    return hvd.rank(), torch_walk(hvd.rank(), device)


def with_torch_distributed():
    import torch.distributed as dist

    dist.init_process_group("gloo")
    return dist.get_rank(), torch_walk(dist.get_rank(), None, transport="torch")


def torch_walk(rank, device, **options):
    import torch

    import ef_horovod.torch as ef

    def walk(method, exchange):
        x = torch.nn.Parameter(torch.zeros(SHAPE, device=device))
        optimizer = ef.DistributedOptimizer(
            torch.optim.SGD([x], lr=1.0),
            [("x", x)],
            compression=method,
            exchange=exchange,
            seed=SEED,
            dense_steps=dense_steps_of(method),
            **options,
        )
        for step in range(STEPS):
            optimizer.zero_grad()
            own = torch.from_numpy(gradient(rank, step)).to(device)
            (x * own).sum().backward()
            optimizer.step()
        return x.detach().cpu().numpy()

    return walk


def with_tensorflow():
    import horovod.tensorflow as hvd
    import tensorflow as tf

    import ef_horovod.tensorflow as ef

    hvd.init()

    def walk(method, exchange):
        x = tf.Variable(tf.zeros(SHAPE))
        dense_steps = dense_steps_of(method)
        reducer = ef.Reducer([x], method, exchange=exchange, seed=SEED, dense_steps=dense_steps)
        for step in range(STEPS):
            (direction,) = reducer.reduce([tf.constant(gradient(hvd.rank(), step))])
            x.assign_sub(direction)
        return x.numpy()

    return hvd.rank(), walk


def main() -> None:
    ways = {"mpi": over_mpi, "torch": with_torch, "tensorflow": with_tensorflow}
    ways["distributed"] = with_torch_distributed
    way, *device = ARGUMENTS[0].split(":")
    rank, walk = ways[way](*device)
    report(
        rank,
        {
            f"{method} by {exchange}": digest(walk(method, exchange))
            for method, exchange in cases(ARGUMENTS[1])
        },
    )


main()
