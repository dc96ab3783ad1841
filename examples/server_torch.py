"""Train the demo's network in PyTorch with a parameter server that compresses both ways.

    launch/server -s 1 -w 4 -- python examples/server_torch.py
    launch/server -s 1 -w 4 -- python examples/server_torch.py --method 'NoFeedback(Identity())'

The second line trains dense, to compare with. The images are scikit-learn's digits.
"""

from __future__ import annotations

import argparse

import demo_data
import numpy as np
import torch
from demo_data import Images
from demo_network import TorchTraining
from demo_training import one_cycle, shuffled_batches

import ef_horovod as base
import ef_horovod.torch as ef
from ef_horovod.methods.parsing import read_method

HIGHEST_STEP_SIZE = 0.03


class ServerTraining(TorchTraining):
    """A network whose gradients the servers average."""

    def __init__(self, method: base.Method, seed: int, train: Images, test: Images) -> None:
        super().__init__(seed, train, test)  # the seed gives all workers the same first weights
        named = list(self._model.named_parameters())
        self._optimizer = ef.DistributedOptimizer(
            self._optimizer, named, compression=method, exchange="server"
        )
        self.rank, self.size = self._optimizer.transport.rank, self._optimizer.transport.size

    def bytes_per_step(self) -> tuple[float, float, float]:
        """Up, down and as float32, for the parameters that are compressed."""
        dense = repr(base.NoFeedback(base.Identity()))
        *buckets, _ = self._optimizer.stats()
        # Small parameters stay dense. If the method is dense itself, all buckets count.
        compressed = [row for row in buckets if row.method != dense] or buckets
        up, down, plain = (
            sum(getattr(row, field) for row in compressed) / buckets[0].steps
            for field in ("bytes_out", "bytes_in", "dense_bytes_out")
        )
        return up, down, plain


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--method",
        type=read_method,
        default="DoubleSqueeze(OneBit(), server_compressor=OneBit())",
        metavar="M",
        help="as in Python, or by name (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    parser.add_argument("--epochs", type=int, default=40, help="(%(default)s)")
    return parser.parse_args()


def main() -> None:
    torch.set_num_threads(1)  # the ranks share the cores
    arguments = parse()
    train, test = demo_data.load(None, 0, 1)
    training = ServerTraining(arguments.method, arguments.seed, train, test)
    mine = demo_data.share(np.arange(len(train.y)), training.rank, training.size)
    batches = shuffled_batches(len(mine), arguments.epochs, arguments.seed, training.rank)
    sizes = one_cycle(len(batches), HIGHEST_STEP_SIZE)
    for step, (batch, size) in enumerate(zip(batches, sizes, strict=True), 1):
        training.set_step_size(size)
        loss = training.step(mine[batch])
        if training.rank == 0 and (step % 100 == 0 or step == len(batches)):
            print(f"step {step}: loss {loss:.3f}", flush=True)
    if training.rank == 0:
        up, down, dense = training.bytes_per_step()
        print(
            f"{arguments.method!r}, {training.size} workers, seed {arguments.seed}: accuracy "
            f"{training.accuracy():.4f}; a step of the compressed parameters has {up:.0f} bytes up "
            f"(1/{dense / up:.1f} of dense) and {down:.0f} down (1/{dense / down:.1f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
