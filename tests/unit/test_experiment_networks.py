"""experiments/networks.py: what a training computes, and what it counts."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

import ef_horovod as ef
from experiments.claims import Report
from experiments.counting import Counts, counted
from experiments.hard_threshold_network import Budget, Momentum, calibrate
from experiments.images import Images, load_cifar10
from experiments.networks import WORKERS, Convolutional, Dense, Network, Plan, Rate, Trainer, train
from experiments.workers import Workers

RATE = Rate(0.1, ())
STEPS = 6


@pytest.fixture(scope="module")
def images() -> Images:
    """A pattern for each class, with noise: a network learns them in a few steps."""
    rng = np.random.default_rng(0)
    labels, patterns = rng.integers(0, 10, 400), rng.integers(0, 200, (10, 3, 16, 16))
    pixels = (patterns[labels] + rng.integers(0, 50, (400, 3, 16, 16))).astype(np.uint8)
    return Images(pixels[:300], labels[:300], pixels[300:], labels[300:])


@pytest.fixture(scope="module")
def trainer(images) -> Trainer:
    return Trainer(Convolutional(16), images, batch=16, looks=3, workers=Workers())


def plan(method, steps=STEPS, **options) -> Plan:
    return Plan("try", method, options.pop("rate", RATE), steps, **options)


# ---- images


def test_binary_cifar10_is_read_and_averaged(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rows = rng.integers(0, 256, (6, 4, 3073), dtype=np.uint8)
    for i in range(5):
        rows[i].tofile(folder / f"data_batch_{i + 1}.bin")
    rows[5].tofile(folder / "test_batch.bin")
    found = load_cifar10(tmp_path, train=6, test=3)
    assert found.train.shape == (6, 3, 16, 16)
    assert found.test.shape == (3, 3, 16, 16)
    assert found.train_labels.tolist() == [*rows[0, :, 0], *rows[1, :2, 0]]
    image = rows[1, 1, 1:].reshape(3, 32, 32).astype(float)
    assert abs(found.train[5, 2, 3, 4] - image[2, 6:8, 8:10].mean()) <= 0.5
    assert load_cifar10(tmp_path, train=2, test=0).test.size == 0


def test_jpeg_cifar10_is_read(tmp_path):
    grey = [np.full((32, 32, 3), value, np.uint8) for value in (10, 100, 200)]
    files = []
    for pixels in grey:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=95)
        files.append(stream.getvalue())
    offset = np.cumsum([0, *(len(f) for f in files)])
    for name in ("train", "test"):
        np.savez(
            tmp_path / f"cifar10_{name}.npz",
            jpeg=np.frombuffer(b"".join(files), np.uint8),
            offset=offset,
            label=np.array([3, 1, 2], np.uint8),
        )
    found = load_cifar10(tmp_path, test=2)
    assert found.train.mean(axis=(1, 2, 3)).round().tolist() == [10, 100, 200]
    assert found.test_labels.tolist() == [3, 1]


def test_missing_images_say_where_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="cs.toronto.edu"):
        load_cifar10(tmp_path)


def test_channels_are_normalised_by_the_training_set(images):
    train, test = images.normalised()
    assert train.dtype == test.dtype == np.float32
    assert np.abs(train.mean(axis=(0, 2, 3))).max() < 1e-5
    assert np.abs(train.std(axis=(0, 2, 3)) - 1).max() < 1e-5


# ---- the network


@pytest.mark.parametrize("shape", [Convolutional(8), Dense((6, 5))], ids=repr)
def test_the_gradient_is_that_of_the_module(images, shape):
    network = Network(shape, images, batch=16)
    x, net = network.start(3), shape.build()
    torch.nn.utils.vector_to_parameters(torch.from_numpy(x), net.parameters())
    rows = np.arange(2, 300, WORKERS)
    rows = rows[np.random.default_rng((7, 2, 5)).integers(0, rows.size, 16)]
    scores = net(torch.from_numpy(images.normalised()[0][rows]))
    torch.nn.functional.cross_entropy(
        scores, torch.from_numpy(images.train_labels[rows])
    ).backward()
    expected = torch.cat([p.grad.ravel() for p in net.parameters()]).numpy()
    found = network.gradient(2, x, 5, 7)
    assert np.abs(found - expected).max() < 1e-6
    assert np.array_equal(found, network.gradient(2, x, 5, 7))
    assert not np.array_equal(found, network.gradient(2, x, 6, 7))


def test_the_sizes_that_texts_name():
    for shape, size in ((Convolutional(64), 106_202), (Dense((512, 512)), 661_514)):
        assert sum(p.numel() for p in shape.build().parameters()) == size


def test_rates_grow_and_drop():
    rate = Rate(2.0, (0.5, 0.75), warm_up=0.1)
    found = [rate(step, 100) for step in (0, 4, 9, 49, 50, 74, 75)]
    assert np.allclose(found, [0.2, 1.0, 2.0, 2.0, 0.2, 0.2, 0.02])


# ---- training and counting


def test_a_training_learns_and_looks(trainer):
    trained = trainer.train(plan(ef.NoFeedback(ef.Identity()), steps=30))
    assert trained.steps == [10, 20, 30]
    assert trained.loss[-1] < 0.7 * math.log(10)
    assert trained.accuracy[-1] > 0.5
    assert trained.parameters == trainer.network.start(0).size


@pytest.mark.parametrize(
    "method",
    [
        ef.NoFeedback(ef.Identity()),
        ef.ErrorFeedback(ef.TopK(ratio=0.01)),
        ef.DoubleSqueeze(ef.OneBit(), server_compressor=ef.OneBit()),
        Momentum(ef.HardThreshold(0.05)),
    ],
    ids=repr,
)
def test_counts_are_those_of_a_server(trainer, method):
    network = trainer.network

    def simulate(exchange):
        return ef.simulate(
            method,
            lambda i, x, t: network.gradient(i, x, t, 0),
            network.start(0),
            workers=WORKERS,
            steps=STEPS,
            step_size=0.1,
            exchange=exchange,
        )

    trained, server = trainer.train(plan(method)), simulate("server")
    if method != ef.NoFeedback(ef.Identity()):
        assert trained.up[-1] // 1 == server.bytes_sent
    assert trained.down[-1] == server.bytes_received
    assert trained.sent[-1] == simulate("auto").bytes_sent
    assert trained.loss[-1] == network.training_loss(server.x)


def test_entries_and_errors_are_counted():
    counts = Counts()
    vectors = np.array([[3.0, 1.0, 0.0, -2.0], [1.0, 1.0, 0.5, 0.0]])
    method = counted(ef.ErrorFeedback(ef.HardThreshold(1.5)), counts)
    ef.simulate(method, lambda i, x, t: vectors[t], np.zeros(4), workers=1, steps=2, step_size=0.1)
    assert counts.entries == 2 + 1  # 3 and -2, then 1 + 1 of the second entry
    assert counts.error == pytest.approx(1 + (1 + 0.25))
    assert counts.messages == 2


def test_momentum_comes_after_the_average(trainer):
    method, (a, b) = Momentum(ef.Identity(), mu=0.5), np.array([[1.0, 2.0], [4.0, -1.0]])
    run = ef.simulate(
        method, lambda i, x, t: (a, b)[t], np.zeros(2), workers=2, steps=2, step_size=1.0
    )
    first, second = a, 0.5 * a + b
    assert np.allclose(run.x, -(a + first) - (b + second))


def test_a_training_that_diverges_ends_with_infinite_loss(trainer):
    sign = ef.OneBit()
    method = ef.NoFeedback(sign, server_compressor=sign)
    trained = trainer.train(plan(method, rate=Rate(1e30, ())))
    assert trained.loss[-1] == math.inf
    assert trained.steps == [2, 4, 6]
    size = sign.nbytes(trained.parameters)
    assert trained.up == trained.down == [2 * size, 4 * size, 6 * size]


@pytest.mark.slow
def test_calibration_comes_near_the_budget(trainer):
    found = calibrate(trainer, Budget(0.01, 200, RATE, 24))
    assert abs(found.trained.entries_a_step / 200 - 1) < 0.25  # few steps, so it jumps
    assert found.whole.runs <= 10
    assert found.trained.plan.method.compressor.threshold == found.whole.threshold
    again = trainer.train(found.trained.plan)
    assert again.entries_a_step == found.whole.average
    assert again.loss == found.trained.loss


@pytest.mark.slow
def test_other_processes_compute_the_same(trainer):
    plans = [plan(ef.ErrorFeedback(ef.TopK(ratio=0.01)), seed=seed) for seed in (0, 1)]
    for there, one in zip(trainer.each(train, plans), plans, strict=True):
        here = trainer.train(one)
        assert there.plan == one
        assert there.loss == here.loss
        assert there.sent == here.sent


def test_rows_with_other_columns_get_a_table_of_their_own():
    report = Report("try", {})
    report.row(a=1)
    report.row(a=2)
    report.row(b=3)
    lines = report.text().splitlines()
    assert [line.strip("| ") for line in lines if line in ("| a   |", "| b   |")] == ["a", "b"]
    assert lines[lines.index("| a   |") + 3] == "| 2   |"
