"""The demos' network in PyTorch, and how it is trained, whoever exchanges the gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from demo_data import Images
from demo_training import MOMENTUM, WEIGHT_DECAY
from torch import nn


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
    """A network and its optimizer, which a subclass or its user wraps.

    Args:
        seed: of the first weights.
        train, test: images.
    """

    def __init__(self, seed: int, train: Images, test: Images) -> None:
        torch.manual_seed(seed)
        self._model = small_cnn(channels=train.x.shape[1], height=train.x.shape[2])
        self.parameters = sum(p.numel() for p in self._model.parameters())
        self._x, self._y = torch.from_numpy(train.x), torch.from_numpy(train.y)
        self._test = test
        self._optimizer: Any = torch.optim.SGD(
            self._model.parameters(), lr=0.0, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )

    def set_step_size(self, size: float) -> None:
        """For the steps to come."""
        for group in self._optimizer.param_groups:
            group["lr"] = size

    def step(self, batch: np.ndarray) -> float:
        """One step with these images; the loss on them."""
        self._optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self._model(self._x[batch]), self._y[batch])
        loss.backward()
        self._optimizer.step()
        return loss.item()

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of the test images that are recognised."""
        parts = torch.from_numpy(self._test.x).split(500)
        predicted = torch.cat([self._model(part).argmax(1) for part in parts])
        return float(np.mean(predicted.numpy() == self._test.y))
