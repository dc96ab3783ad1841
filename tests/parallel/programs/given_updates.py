"""Gradients and settings that the programs about CompressedUpdates share."""

from __future__ import annotations

from typing import Any

import numpy as np

STEPS = 10
CASES = ("SGD", 1), ("AdamW", 1), ("AdamW", 4)  # optimizer and local steps
SHAPES = ((40, 60), (7,), (50, 30))  # two that are compressed, as one vector, and a dense one
# Keras adds epsilon inside of the bias correction, PyTorch outside: a tiny one makes them equal.
SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "AdamW": {"lr": 0.003, "eps": 1e-12, "weight_decay": 0.01},
}


def gradients_of(rank: int, step: int) -> list[np.ndarray]:
    """float32 gradients of the shapes, other ones on each rank and in each step."""
    generator = np.random.default_rng((rank, step))
    return [generator.standard_normal(shape, np.float32) for shape in SHAPES]
