"""What the tests of methods share; the workers themselves are in `ef_horovod.testing.workers`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

import ef_horovod as ef
from ef_horovod.testing.pairs import every_compressor, every_method
from ef_horovod.testing.tools import host  # noqa: F401 - for the tests
from ef_horovod.testing.workers import (  # noqa: F401 - for the tests
    D,
    Workers,
    channels,
    float32_zeros,
    gradients,
    memory,
    run_channels,
)

COMPRESSORS, METHODS = every_compressor(), every_method()
CONTRACTIONS = [c for c in COMPRESSORS if c.contracts]
DETERMINISTIC = [c for c in CONTRACTIONS if isinstance(c, (ef.Identity, ef.TopK, ef.OneBit))]


class FixedMask(ef.RandomK):
    """The same entries in every step: deterministic, additive and homogeneous, which Top-k is not.

    It borrows RandomK's messages, and draws from one key for ever.
    """

    def encode(self, x, key, *, residual):
        return super().encode(x, ef.Key(), residual=residual)


class Quadratics(NamedTuple):
    """f_i(x) = x' A_i x / 2 - b_i' x for n workers, strongly convex on average."""

    A: np.ndarray  # float64[n, d, d], positive semi-definite
    b: np.ndarray  # float64[n, d]

    @classmethod
    def draw(cls, n=5, d=20, *, spread=1.0, seed=0):
        """`spread`: by how much L_i differ."""
        rng = np.random.default_rng(seed)
        roots = rng.normal(size=(n, d, d)) * np.exp(spread * rng.normal(size=(n, 1, 1)))
        A = roots @ roots.transpose(0, 2, 1) / d + 0.1 * np.eye(d)
        return cls(A, rng.normal(size=(n, d)))

    @property
    def L_i(self):
        return np.array([np.linalg.eigvalsh(a)[-1] for a in self.A])

    @property
    def L(self):
        return np.linalg.eigvalsh(self.A.mean(0))[-1]

    @property
    def mu(self):
        return np.linalg.eigvalsh(self.A.mean(0))[0]

    def gradients(self, x):
        """float64[n, d]."""
        return self.A @ x - self.b

    def gap(self, x):
        """f(x) - min f."""
        optimum = np.linalg.solve(self.A.mean(0), self.b.mean(0))
        return float((x - optimum) @ self.A.mean(0) @ (x - optimum) / 2)
