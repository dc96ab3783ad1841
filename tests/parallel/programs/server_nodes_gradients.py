"""What the workers of test_server_nodes.py do; gradients follow from worker and step alone."""

from __future__ import annotations

import numpy as np

import ef_horovod as ef

SHAPES = {"w": (64, 128), "b": (3,), "v": (40, 60)}
STEPS, BAD, LIMIT = 5, 3, 3.0  # BAD: the step with a NaN; seconds
TOP, SIGNS = ef.TopK(ratio=0.1), ef.OneBit()
METHODS = [
    ef.ErrorFeedback(TOP),
    ef.DoubleSqueeze(SIGNS, server_compressor=TOP),
    ef.EF21(SIGNS, server_compressor=SIGNS),
    ef.NoFeedback(ef.QSGD(16)),
    ef.ErrorFeedback(ef.RandomK(ratio=0.1)),
    ef.NoFeedback(ef.Identity()),
]


def gradient(worker: int, step: int, name: str) -> np.ndarray:
    """Whole numbers, whose sums are exact."""
    return np.random.default_rng((worker, step)).integers(-8, 9, SHAPES[name]).astype(np.float32)
