"""Momentum before or after the compression: training losses of a small network, without Horovod.

    pip install scikit-learn    # for the digits
    python examples/numpy_momentum.py

Four workers train 64-128-64-10 rectified units on the digits, in batches of 16. Each row is a
method, each column a learning rate. "EF, momentum after" is top-k with error feedback and SGD's
momentum on the aggregated gradient, the usual way.
"""

import numpy as np
from sklearn.datasets import load_digits  # pip install scikit-learn

import ef_horovod as ef

WORKERS, BATCH, STEPS, SEEDS, MOMENTUM = 4, 16, 300, 3, 0.9
LEARNING_RATES = (0.03, 0.1, 0.2, 0.3)
SHAPES = ((64, 128), (128, 64), (64, 10))
TOP = ef.TopK(ratio=0.01)

digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))[:1200]
images = (digits.data[order] / 16 - 0.3).astype(np.float32)
classes = digits.target[order]


def layers(weights: np.ndarray) -> list[np.ndarray]:
    ends = np.cumsum([a * b for a, b in SHAPES])[:-1]
    return [part.reshape(s) for part, s in zip(np.split(weights, ends), SHAPES, strict=True)]


def forward(weights: np.ndarray, x: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The inputs of all layers, and the classes' probabilities."""
    inputs, (*hidden, last) = [x], layers(weights)
    for matrix in hidden:
        inputs.append(np.maximum(inputs[-1] @ matrix, 0))
    scores = inputs[-1] @ last
    odds = np.exp(scores - scores.max(1, keepdims=True))
    return inputs, odds / odds.sum(1, keepdims=True)


def loss(weights: np.ndarray) -> float:
    of_truth = forward(weights, images)[1][np.arange(len(images)), classes]
    return float(-np.log(of_truth + 1e-12).mean())


class Network:
    """Gradients by batches that follow from seed, worker and step."""

    def __init__(self, seed: int) -> None:
        self.seed, draw = seed, np.random.default_rng(seed).normal
        parts = [draw(size=(a, b)).ravel() * np.sqrt(2 / a) for a, b in SHAPES]
        self.start = np.concatenate(parts).astype(np.float32)

    def gradient(self, worker: int, weights: np.ndarray, step: int) -> np.ndarray:
        mine = np.arange(worker, len(images), WORKERS)
        batch = np.random.default_rng((self.seed, worker, step)).choice(mine, BATCH)
        inputs, back = forward(weights, images[batch])
        back[np.arange(BATCH), classes[batch]] -= 1
        gradients = []
        for x, matrix in zip(reversed(inputs), reversed(layers(weights)), strict=True):
            gradients.append((x.T @ back).ravel() / BATCH)
            back = back @ matrix.T * (x > 0)
        return np.concatenate(gradients[::-1])


class MomentumAfter(Network):
    """SGD's momentum outside of `simulate`, whose iterates z then only add up directions."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.z = self.weights = self.start
        self.velocity = np.zeros_like(self.start)

    def gradient(self, worker: int, z: np.ndarray, step: int) -> np.ndarray:
        return super().gradient(worker, self.at(z), step)

    def at(self, z: np.ndarray) -> np.ndarray:
        if not np.array_equal(z, self.z):  # the first worker of a step
            self.velocity = MOMENTUM * self.velocity + (self.z - z)
            self.z, self.weights = z.copy(), self.weights - self.velocity
        return self.weights


def trained(network: Network, method: ef.Method, rate: float) -> float:
    run = ef.simulate(
        method, network.gradient, network.start, workers=WORKERS, steps=STEPS, step_size=rate
    )
    return loss(network.at(run.x) if isinstance(network, MomentumAfter) else run.x)


RUNS = {
    "dense, momentum SGD": (Network, ef.MomentumCorrection(ef.Identity(), MOMENTUM)),
    "EF, momentum after": (MomentumAfter, ef.ErrorFeedback(TOP)),
    "MomentumCorrection": (Network, ef.MomentumCorrection(TOP, MOMENTUM)),
    "the same, masking=False": (Network, ef.MomentumCorrection(TOP, MOMENTUM, masking=False)),
}

print(f"{'learning rate':24}", *(f"{rate:>8}" for rate in LEARNING_RATES))
for name, (kind, method) in RUNS.items():
    losses = [
        np.mean([trained(kind(seed), method, rate) for seed in range(SEEDS)])
        for rate in LEARNING_RATES
    ]
    print(f"{name:24}", *(f"{value:8.4f}" for value in losses))
