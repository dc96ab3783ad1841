"""experiments/small_networks.py: gradients against differences, and images without a file."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def networks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return importlib.import_module("experiments.small_networks")


@pytest.mark.parametrize(
    ("sizes", "targets"),
    [((256, 10), "classes"), ((256, 8, 6, 10), "classes"), ((256, 8, 256), "inputs")],
    ids=repr,
)
def test_the_gradient_is_that_of_the_loss(networks, tmp_path, sizes, targets):
    images = networks.load_images(tmp_path, 20)
    network, h = networks.Network(sizes, targets), 1e-4
    x = network.start(scale=0.5).astype(np.float64)
    way = np.random.default_rng(1).normal(size=network.d)
    slope = (network.loss(x + h * way, images) - network.loss(x - h * way, images)) / (2 * h)
    assert network.gradient(x, images) @ way == pytest.approx(slope, rel=1e-5)
    assert abs(slope) > 0.01


def test_zero_is_a_saddle_point_of_the_autoencoder(networks, tmp_path):
    images = networks.load_images(tmp_path, 20)
    network = networks.Network((256, 8, 256), "inputs")
    assert not np.any(network.gradient(np.zeros(network.d), images))
    outward, inward = np.linalg.svd(images.pixels)[2][0], np.zeros((256, 8))
    inward[:, 0] = 0.01 * outward
    low = np.concatenate([inward.ravel(), inward.T.ravel()])
    high = np.concatenate([inward.ravel(), -inward.T.ravel()])
    at_zero = network.loss(np.zeros(network.d), images)
    assert network.loss(low, images) < at_zero < network.loss(high, images)


def test_made_up_images_say_so(networks, tmp_path):
    images = networks.load_images(tmp_path, 50)
    assert images.source == "made-up, 50 images (no CIFAR-10 in --data)"
    assert images.pixels.shape == (50, 256)
    assert images.pixels.dtype == np.float32
    assert images.pixels.std() == pytest.approx(1, abs=1e-4)
    assert set(images.labels) <= set(range(10))


def test_images_come_from_the_file(networks, tmp_path):
    import io

    from PIL import Image

    files = []
    for level in (0, 128, 255):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (level, level, level)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    for name in ("cifar10_train.npz", "cifar10_test.npz"):
        np.savez(
            tmp_path / name,
            jpeg=np.frombuffer(b"".join(files), np.uint8),
            offset=np.cumsum([0, *map(len, files)]),
            label=np.array([3, 1, 4], np.uint8),
        )
    images = networks.load_images(tmp_path, 3)
    assert images.labels.tolist() == [3, 1, 4]
    means = images.pixels.mean(1)
    assert means[0] < means[1] < means[2]
    assert np.ptp(images.pixels, axis=1).max() < 0.1
    assert "CIFAR-10" in images.source
