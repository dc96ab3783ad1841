"""Train a small convolutional network over Horovod with and without error feedback, and compare.

    horovodrun -np 2 python examples/demo_torch.py

`launch/demo` makes the environment and runs this. Every method trains the same network on the same
batches with the same optimizer, for every seed; at the end come a table, a plot and a log.
"""

from __future__ import annotations

import demo_training
import horovod.torch as hvd
import numpy as np
import torch
from demo_data import Images
from demo_methods import CountingCompression, Row, Sent, sent_by
from demo_training import MOMENTUM, WEIGHT_DECAY, Framework
from torch import nn

import ef_horovod.torch as ef


def small_cnn(channels: int, height: int) -> nn.Module:
    """Two convolutions and two linear layers, about 150,000 parameters."""
    first = nn.MaxPool2d(2) if height > 16 else nn.Identity()
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        first,
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(4),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


class TorchTraining:
    """A network that is trained by one method; see `demo_training.Training`."""

    def __init__(self, row: Row, seed: int, train: Images, test: Images) -> None:
        torch.manual_seed(seed)
        self._model = model = small_cnn(channels=train.x.shape[1], height=train.x.shape[2])
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        self.parameters = sum(p.numel() for p in model.parameters())
        self._x, self._y = torch.from_numpy(train.x), torch.from_numpy(train.y)
        self._test = test
        self._counting: CountingCompression | None = None
        named = list(model.named_parameters())
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.0, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        if row.method is None:
            stock = getattr(hvd.Compression, row.stock)
            counting = CountingCompression(stock, hvd.size(), lambda t: t.element_size())
            self._counting = counting
            self._optimizer = hvd.DistributedOptimizer(optimizer, named, compression=counting)
        else:
            self._optimizer = ef.DistributedOptimizer(optimizer, named, compression=row.method)

    def set_step_size(self, size: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = size

    def step(self, batch: np.ndarray) -> float:
        self._optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self._model(self._x[batch]), self._y[batch])
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def sent(self) -> Sent:
        return self._counting.sent if self._counting else sent_by(self._optimizer.stats())

    @torch.no_grad()
    def accuracy(self) -> float:
        parts = torch.from_numpy(self._test.x).split(500)
        predicted = torch.cat([self._model(part).argmax(1) for part in parts])
        return float(np.mean(predicted.numpy() == self._test.y))


if __name__ == "__main__":
    torch.set_num_threads(1)  # the ranks share the cores
    demo_training.main(Framework("PyTorch", hvd, TorchTraining), __doc__)
