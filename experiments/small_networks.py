"""Small networks as functions of one flat vector, with gradients written out in NumPy.

They are for methods whose steps cost more than their gradients: no framework, float32, 256 inputs.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.errors import DataNotFound
from experiments.images import load_cifar10

SIDE, CLASSES = 16, 10


class Images(NamedTuple):
    """Pictures of 16 x 16 grey pixels."""

    pixels: np.ndarray  # float32[images, 256], of mean 0 and variance 1 over all of them
    labels: np.ndarray  # int64[images], 0 to 9
    source: str  # for the report


class Network:
    """Dense layers with tanh between them, without biases: x is one vector for all weights.

    Args:
        sizes: of the layers, the input's first.
        targets: "classes" for softmax and cross-entropy on labels, "inputs" for an autoencoder with
            half the squared distance, both means over the samples.
    """

    def __init__(self, sizes: tuple[int, ...], targets: str) -> None:
        self.shapes = list(pairwise(sizes))
        self.d = sum(rows * columns for rows, columns in self.shapes)
        self._targets = targets

    def start(self, scale: float = 1.0, seed: int = 0) -> np.ndarray:
        """Random weights of standard deviation scale / sqrt(inputs of the layer): float32[d]."""
        rng = np.random.default_rng(seed)
        parts = [rng.normal(size=shape).ravel() / np.sqrt(shape[0]) for shape in self.shapes]
        return (scale * np.concatenate(parts)).astype(np.float32)

    def loss(self, x: np.ndarray, images: Images) -> float:
        """The mean over samples, without a gradient."""
        return self._errors(self._layers(x, images.pixels)[-1], images)[0]

    def gradient(self, x: np.ndarray, images: Images) -> np.ndarray:
        """Of the loss at x: float32[d]."""
        layers, weights = self._layers(x, images.pixels), self._weights(x)
        back = self._errors(layers[-1], images)[1]
        parts = []
        for before, matrix in zip(layers[-2::-1], weights[::-1], strict=True):
            parts.append((before.T @ back).ravel())
            back = (back @ matrix.T) * (1 - before**2)  # of the input's, nothing comes
        return np.concatenate(parts[::-1])

    def _weights(self, x: np.ndarray) -> list[np.ndarray]:
        ends = np.cumsum([rows * columns for rows, columns in self.shapes])[:-1]
        return [
            part.reshape(shape) for part, shape in zip(np.split(x, ends), self.shapes, strict=True)
        ]

    def _layers(self, x: np.ndarray, pixels: np.ndarray) -> list[np.ndarray]:
        layers = [pixels]
        for matrix in self._weights(x)[:-1]:
            layers.append(np.tanh(layers[-1] @ matrix))
        return [*layers, layers[-1] @ self._weights(x)[-1]]

    def _errors(self, output: np.ndarray, images: Images) -> tuple[float, np.ndarray]:
        """The loss and its derivative by the output."""
        count = len(output)
        if self._targets == "inputs":
            off = output - images.pixels
            return float(np.sum(off**2) / (2 * count)), off / count
        logits = output - output.max(1, keepdims=True)
        chances = np.exp(logits)
        chances /= chances.sum(1, keepdims=True)
        rows = np.arange(count)
        loss = -float(np.mean(np.log(chances[rows, images.labels] + 1e-30)))
        chances[rows, images.labels] -= 1
        return loss, chances / count


def load_images(data: Path, count: int) -> Images:
    """The first images of CIFAR-10, grey; made-up ones where it is missing.

    Args:
        data: folder; see `images.load_cifar10`.
        count: how many.
    """
    try:
        colour = load_cifar10(data, train=count, test=0)
    except DataNotFound:
        return _made_up(count)
    red, green, blue = colour.train.astype(np.float32).transpose(1, 0, 2, 3)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue  # luminance, ITU-R BT.601
    return Images(_standard(grey), colour.train_labels, f"CIFAR-10, {count} images, 16 x 16")


def _made_up(count: int) -> Images:
    """A smooth pattern for each class and smooth noise: neighbours alike, as in photographs."""
    rng = np.random.default_rng(0)

    def smooth(number: int) -> np.ndarray:
        noise = rng.normal(size=(number, SIDE // 4, SIDE // 4))
        return noise.repeat(4, 1).repeat(4, 2)

    labels = rng.integers(0, CLASSES, count)
    fine = 0.3 * rng.normal(size=(count, SIDE, SIDE))
    pixels = 0.5 * smooth(CLASSES)[labels] + smooth(count) + fine
    return Images(_standard(pixels), labels, f"made-up, {count} images (no CIFAR-10 in --data)")


def _standard(pixels: np.ndarray) -> np.ndarray:
    flat = pixels.reshape(len(pixels), -1)
    flat = flat - flat.mean(0)
    return (flat / flat.std()).astype(np.float32)
