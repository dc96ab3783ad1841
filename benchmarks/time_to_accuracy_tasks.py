"""The tasks of `benchmarks/time_to_accuracy.py` on one rank: model, batches and score."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from text_model import Text, Transformer, loss
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, gelu, pad

Batch = tuple[torch.Tensor, torch.Tensor]
_PAD = 2  # pixels
_SMOOTHING = 0.1  # of labels


class Images:
    """CIFAR-10, and a residual network of 0.76 million parameters with batch norm.

    Its first layer is fixed: it whitens pieces of 2 x 2 pixels, which saves epochs (K. Jordan, "94%
    on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498).

    Args:
        folder: of prepared arrays, see `prepare`.
        rank, ranks: each rank has its own part of each epoch.
        seed: of orders, crops and flips.
    """

    batch, clip = 64, None
    weight_decay = 1e-3

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

    def model(self) -> nn.Module:
        """Whitening, then three residual stages of 32, 128 and 192 channels."""
        return _network((32, 128, 192), _whitening(self._normal(self._train[:5000])))

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
        """Mean cross-entropy with smoothed labels."""
        return cross_entropy(model(batch[0]).float(), batch[1], label_smoothing=_SMOOTHING)

    def score(self, model: nn.Module) -> tuple[float, int]:
        """Sum of right answers (in %) over this rank's test images, and their number.

        An answer is that to the image and its mirror image together.
        """
        right = 0
        for start in range(0, len(self._test), 500):
            part = slice(start, start + 500)
            images = self._normal(self._test[part])
            answers = (model(images) + model(images.flip(3))).argmax(1)
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


def _network(widths: tuple[int, int, int], whitening: torch.Tensor) -> nn.Module:
    a, b, c = widths
    return nn.Sequential(
        _Whitening(whitening),
        _stage(len(whitening), a),
        _stage(a, b),
        _stage(b, c),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(c, 10),
    )


def _stage(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(after),
        nn.GELU(),
        _Residual(after),
    )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        convolution = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.layer = nn.Sequential(convolution, nn.BatchNorm2d(width), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(x)


class _Whitening(nn.Module):
    """A fixed convolution and its negative; equal on all ranks, so it is no parameter."""

    def __init__(self, filters: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("filters", filters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gelu(conv2d(x, self.filters))


def _whitening(images: torch.Tensor) -> torch.Tensor:
    """Filters whose outputs over pieces of 2 x 2 pixels have variance 1 and no correlation."""
    size, channels = 2, images.shape[1]
    pieces = images.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5)
    rows = pieces.reshape(-1, channels * size * size).double()
    variances, directions = torch.linalg.eigh(rows.T @ rows / len(rows))
    filters = (directions / torch.sqrt(variances + 5e-4)).T.float()
    filters = filters.reshape(-1, channels, size, size)
    return torch.cat([filters, -filters])
