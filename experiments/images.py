"""CIFAR-10, read once: images of 16 x 16, averaged over 2 x 2 pixels, or of 32 x 32."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ef_horovod.common.extras import require
from experiments.errors import DataNotFound, reading

WHERE = "https://www.cs.toronto.edu/~kriz/cifar.html"
_ROW = 1 + 3 * 32 * 32  # bytes: a label, then the channels


@dataclass(frozen=True)
class Images:
    """A training and a test set.

    Attributes:
        train, test: uint8[n, 3, 16, 16], or of 32 x 32 pixels.
        train_labels, test_labels: int64[n], 0 to 9.
    """

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray

    def normalised(self) -> tuple[np.ndarray, np.ndarray]:
        """Training and test set as float32, each channel of the training set with mean 0 and
        standard deviation 1."""
        mean = self.train.mean(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
        deviation = self.train.std(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
        shift, scale = mean.astype(np.float32), (1 / deviation).astype(np.float32)
        return (self.train - shift) * scale, (self.test - shift) * scale

    def halved(self) -> Images:
        """Images of half the width and height."""
        train, test = _halved(self.train), _halved(self.test)
        return Images(train, self.train_labels, test, self.test_labels)


def load_cifar10(
    data: Path, *, train: int = 50_000, test: int = 10_000, halve: bool = True
) -> Images:
    """The first images of each set.

    Args:
        data: folder with the binary version (data_batch_1.bin to data_batch_5.bin and
            test_batch.bin, or these in cifar-10-batches-bin/), or with cifar10_train.npz and
            cifar10_test.npz: `jpeg` (uint8, files one after another), `offset` (int64[n + 1]) and
            `label` (uint8[n]).
        train, test: how many, at most 50,000 and 10,000.
        halve: average over 2 x 2 pixels.

    Raises:
        DataNotFound: neither is there; says where to get it.
        Refused: a file cannot be read.
    """
    for folder in (data, data / "cifar-10-batches-bin"):
        if (folder / "test_batch.bin").is_file():
            batches = [folder / f"data_batch_{i}.bin" for i in range(1, 6)]
            with reading(f"the batches in {folder}", WHERE):
                tests = [folder / "test_batch.bin"]
                found = Images(*_from_binary(batches, train), *_from_binary(tests, test))
                return found.halved() if halve else found
    if (data / "cifar10_train.npz").is_file():
        require("PIL", "reading the images")
        with reading(f"the archives in {data}", WHERE):
            found = Images(
                *_from_jpeg(data / "cifar10_train.npz", train),
                *_from_jpeg(data / "cifar10_test.npz", test),
            )
            return found.halved() if halve else found
    raise DataNotFound(
        f"found no test_batch.bin in {data} or {data / 'cifar-10-batches-bin'}, expected CIFAR-10 "
        f"(binary version); get it from {WHERE}, unpack it and pass its folder as --data"
    )


def _from_binary(paths: list[Path], count: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.concatenate([np.fromfile(path, np.uint8).reshape(-1, _ROW) for path in paths])
    return rows[:count, 1:].reshape(-1, 3, 32, 32), rows[:count, 0].astype(np.int64)


def _from_jpeg(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    with np.load(path) as stored:
        jpeg, offset, labels = (stored[key] for key in ("jpeg", "offset", "label"))
    count = min(count, labels.size)
    images = np.empty((count, 3, 32, 32), np.uint8)
    for i in range(count):
        image = Image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]]))
        images[i] = np.asarray(image).transpose(2, 0, 1)
    return images, labels[:count].astype(np.int64)


def _halved(images: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels, rounded: uint8[n, 3, 16, 16] from uint8[n, 3, 32, 32]."""
    n = images.shape[0]
    sums = images.reshape(n, 3, 16, 2, 16, 2).sum(axis=(3, 5), dtype=np.uint16)
    return ((sums + 2) // 4).astype(np.uint8)
