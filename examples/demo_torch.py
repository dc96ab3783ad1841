"""Train a small convolutional network over Horovod with and without error feedback, and compare.

    horovodrun -np 2 python examples/demo_torch.py

`launch/demo` makes the environment and runs this. Every method trains the same network on the same
batches with the same optimizer, for every seed; at the end come a table, a plot and a log.
"""

from __future__ import annotations

import demo_training
import horovod.torch as hvd
import torch
from demo_data import Images
from demo_methods import CountingCompression, Row, sent_by
from demo_network import TorchTraining
from demo_training import Framework

import ef_horovod.torch as ef


class HorovodTraining(TorchTraining):
    """A network that is trained by one method; see `demo_training.Training`."""

    def __init__(self, row: Row, seed: int, train: Images, test: Images) -> None:
        super().__init__(seed, train, test)
        hvd.broadcast_parameters(self._model.state_dict(), root_rank=0)
        named = list(self._model.named_parameters())
        inner = self._optimizer
        if row.method is None:
            stock = getattr(hvd.Compression, row.stock)
            counting = CountingCompression(stock, hvd.size(), lambda t: t.element_size())
            self._optimizer = hvd.DistributedOptimizer(inner, named, compression=counting)
            self.sent = lambda: counting.sent
        elif row.adapter:
            adapter = ef.Compression(row.method, named)
            self._optimizer = hvd.DistributedOptimizer(inner, named, compression=adapter)
            self.sent = lambda: sent_by(adapter.stats())
        else:
            wrap = ef.CompressedUpdates if row.updates else ef.DistributedOptimizer
            optimizer = wrap(inner, named, compression=row.method)
            self._optimizer = optimizer
            self.sent = lambda: sent_by(optimizer.stats())


if __name__ == "__main__":
    torch.set_num_threads(1)  # the ranks share the cores
    demo_training.main(Framework("PyTorch", hvd, HorovodTraining), __doc__)
