"""The tasks of `benchmarks/time_to_accuracy.py` on one rank: model, batches and score."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from text_model import Text, Transformer, loss
from torch import nn
from torch.nn.functional import cross_entropy, pad

Batch = tuple[torch.Tensor, torch.Tensor]
_PAD = 4  # pixels


class Images:
    """CIFAR-10, and a residual network of 0.41 million parameters with batch norm.

    Args:
        folder: of prepared arrays, see `prepare`.
        rank, ranks: each rank has its own part of each epoch.
        seed: of orders, crops and flips.
    """

    batch, clip = 64, None
    weight_decay = 5e-4

    def __init__(self, folder: Path, rank: int, ranks: int, seed: int) -> None:
        arrays = {f.stem: torch.from_numpy(np.load(f)) for f in folder.glob("images-*.npy")}
        self._train, self._labels = arrays["images-train"], arrays["images-train_labels"]
        self._test, self._test_labels = (
            arrays[f"images-{name}"][rank::ranks] for name in ("test", "test_labels")
        )
        pixels = self._train[::7].double() / 255
        self._mean = pixels.mean((0, 2, 3), keepdim=True).float()
        self._deviation = pixels.std((0, 2, 3), keepdim=True).float()
        self._rank, self._ranks, self._seed = rank, ranks, seed
        self._draw = torch.Generator().manual_seed(1000 * seed + rank)
        self.steps = len(self._labels) // (self.batch * ranks)  # of an epoch

    @staticmethod
    def model() -> nn.Module:
        """Four stages of 16, 32, 64 and 128 channels, two of them with a residual block."""
        return _network((16, 32, 64, 128))

    def epoch(self, number: int) -> Iterator[Batch]:
        """This rank's batches of an epoch: random crops of padded images, half of them flipped."""
        everybody = torch.Generator().manual_seed(100_000 * (self._seed + 1) + number)
        order = torch.randperm(len(self._labels), generator=everybody)[self._rank :: self._ranks]
        for step in range(self.steps):
            chosen = order[step * self.batch : (step + 1) * self.batch]
            yield self._normal(self._crops(self._train[chosen])), self._labels[chosen]

    def _crops(self, images: torch.Tensor) -> torch.Tensor:
        n, size = len(images), images.shape[-1]
        padded = pad(images.float(), (_PAD,) * 4, mode="reflect")
        corners = torch.randint(2 * _PAD + 1, (2, n, 1), generator=self._draw)
        rows, columns = corners + torch.arange(size)
        flipped = torch.rand(n, generator=self._draw) < 0.5
        columns[flipped] = columns[flipped].flip(1)
        picture, channel = torch.arange(n).view(n, 1, 1, 1), torch.arange(3).view(1, 3, 1, 1)
        return padded[picture, channel, rows.view(n, 1, size, 1), columns.view(n, 1, 1, size)]

    def _normal(self, images: torch.Tensor) -> torch.Tensor:
        images = (images.float() / 255 - self._mean) / self._deviation
        return images.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy."""
        return cross_entropy(model(batch[0]).float(), batch[1])

    def score(self, model: nn.Module) -> tuple[float, int]:
        """Sum of right answers (in %) over this rank's test images, and their number."""
        right = 0
        for start in range(0, len(self._test), 500):
            part = slice(start, start + 500)
            answers = model(self._normal(self._test[part])).argmax(1)
            right += int((answers == self._test_labels[part]).sum())
        return 100.0 * right, len(self._test)


class Characters:
    """A text, and a transformer of 2.3 million parameters that predicts the next character."""

    batch, clip = 8, 1.0
    weight_decay = 0.01
    _length = 128

    def __init__(self, folder: Path, rank: int, ranks: int, seed: int) -> None:
        self._text = Text.read(folder / "text", self._length)
        self._draw = torch.Generator().manual_seed(1000 * seed + rank)
        x, y = self._text.validation_pieces(512)
        self._validation = x[rank::ranks], y[rank::ranks]
        self.steps = 400  # an epoch, by name

    def model(self) -> nn.Module:
        """Five layers of width 192."""
        return Transformer(self._text.characters, width=192, layers=5, heads=6, length=self._length)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Random pieces."""
        for _ in range(self.steps):
            yield self._text.batch(self.batch, self._draw)

    @staticmethod
    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        """In nats per character."""
        return loss(model, *batch)

    def score(self, model: nn.Module) -> tuple[float, int]:
        """Sum of losses over this rank's pieces of validation, and their number."""
        x, y = self._validation
        total = 0.0
        for start in range(0, len(x), 32):
            part = slice(start, start + 32)
            total += float(loss(model, x[part], y[part])) * len(x[part])
        return total, len(x)


TASKS: dict[str, Any] = {"images": Images, "text": Characters}


def _network(widths: tuple[int, int, int, int]) -> nn.Module:
    a, b, c, d = widths
    return nn.Sequential(
        _layer(3, a),
        _layer(a, b, pool=True),
        _Residual(b),
        _layer(b, c, pool=True),
        _layer(c, d, pool=True),
        _Residual(d),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(d, 10),
    )


def _layer(before: int, after: int, *, pool: bool = False) -> nn.Sequential:
    pooling = [nn.MaxPool2d(2)] if pool else []
    convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
    return nn.Sequential(convolution, *pooling, nn.BatchNorm2d(after), nn.ReLU())


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_layer(width, width), _layer(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)
