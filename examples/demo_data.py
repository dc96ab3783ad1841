"""Images for the demo: scikit-learn's digits, or CIFAR-10 archives that you name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Images(NamedTuple):
    """Images with their classes."""

    x: np.ndarray  # float32[n, channels, height, width], about zero mean and unit variance
    y: np.ndarray  # int64[n]


FOLDS = 3  # parts of the digits; seeds take turns with which one tests


def load(data: Path | None, rank: int, size: int, fold: int = 0) -> tuple[Images, Images]:
    """This rank's share of the training images, and all test images.

    Args:
        data: folder of the CIFAR-10 archives, None for the digits.
        fold: which third of the digits tests; CIFAR-10 has a test set.
        rank, size: every size-th training image belongs to this rank; all ranks get equally many.
    """
    if data is None:
        x, y = _digits()
        order = np.random.default_rng(0).permutation(len(y))
        folds = np.array_split(order, FOLDS)
        test = folds[fold]
        train = np.concatenate([part for i, part in enumerate(folds) if i != fold])
        mine = share(train, rank, size)
        return _images(x[mine], y[mine]), _images(x[test], y[test])
    train_file, test_file = data / "cifar10_train.npz", data / "cifar10_test.npz"
    for file in (train_file, test_file):
        if not file.is_file():
            raise SystemExit(f"error: --data {data} has no {file.name}; see --help for its format")
    return _archive(train_file, rank, size), _archive(test_file, 0, 1)


def share(indices: np.ndarray, rank: int, size: int) -> np.ndarray:
    """Every size-th of the indices from `rank` on; equally many on all ranks."""
    return indices[rank::size][: len(indices) // size]


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # pip install scikit-learn

    digits = load_digits()
    return digits.images[:, None] / 16.0, digits.target  # 8 x 8 pixels of 0 to 16


def _archive(file: Path, rank: int, size: int) -> Images:
    from PIL import Image  # pip install pillow

    with np.load(file) as archive:
        jpeg, offset, label = archive["jpeg"], archive["offset"], archive["label"]
    mine = share(np.arange(len(label)), rank, size)
    pixels = [
        np.asarray(Image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes())).convert("RGB"))
        for i in mine
    ]
    return _images(np.stack(pixels).transpose(0, 3, 1, 2) / 255.0, label[mine])


def _images(x: np.ndarray, y: np.ndarray) -> Images:
    # One mean and deviation for all, the same on all ranks: those of the digits, near CIFAR's.
    return Images(((x - 0.35) / 0.35).astype(np.float32), y.astype(np.int64))
