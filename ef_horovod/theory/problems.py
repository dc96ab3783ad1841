"""The papers' test problems, for `ef_horovod.simulate`, and a reader for their data files."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from ef_horovod.theory.smoothness import (
    Loss,
    Regulariser,
    Smoothness,
    pl_constant,
    require_objective,
    smoothness_constants,
)


class Shard(NamedTuple):
    """One worker's rows."""

    features: np.ndarray  # float64[N_i, d], A_i
    labels: np.ndarray  # float64[N_i], y_i; -1 or +1 for the logistic loss


@dataclass(frozen=True, eq=False)
class Problem:
    """f = (1/n) sum_i f_i, with f_i the mean loss over worker i's rows plus a regulariser.

    Pass `gradient` to `simulate`. All numbers are float64.

    Args:
        shards: each worker's rows.
        loss: "logistic" is log(1 + exp(-y a^T x)), "squares" is (a^T x - y)^2 / 2.
        regulariser: "none", "l2" for (lam / 2) ||x||^2, or "nonconvex" for
            lam sum_j x_j^2 / (1 + x_j^2).
        lam: its weight, at least 0.

    Raises:
        ValueError: names or lam as for `smoothness_constants`, shapes do not fit, or labels are not
            -1 and +1 with the logistic loss.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> shards = ef.theory.contiguous_shards(numpy.eye(4), numpy.array([1.0, -1, 1, -1]), 2)
        >>> problem = ef.theory.Problem(shards, "logistic", "nonconvex", 0.1)
        >>> run = ef.simulate(ef.EF21(ef.TopK(k=2)), problem.gradient, numpy.ones(4), workers=2,
        ...                   steps=500, step_size=ef.theory.ef21_step(problem.smoothness(), 0.5))
        >>> bool(numpy.linalg.norm(problem.mean_gradient(run.x)) < 1e-2)
        True

    References:
        EF21 (NeurIPS 2021), experiments: logistic regression with the nonconvex regulariser, and
        least squares, there with a factor that gradient and loss do not share.
    """

    shards: Sequence[Shard]
    loss: Loss = "logistic"
    regulariser: Regulariser = "nonconvex"
    lam: float = 0.1

    def __post_init__(self) -> None:
        require_objective(self.loss, self.regulariser, self.lam)
        for i, (features, labels) in enumerate(self.shards):
            if np.shape(labels) != np.shape(features)[:1]:
                raise ValueError(
                    f"shard {i} has features of shape {np.shape(features)} and labels of shape "
                    f"{np.shape(labels)}, expected one label for each row; see contiguous_shards"
                )
            if self.loss == "logistic" and not np.all(np.abs(labels) == 1):
                raise ValueError(
                    f"shard {i} has labels {np.unique(labels)[:4]}, expected -1 and +1 for the "
                    "logistic loss; map them first, as load_libsvm does"
                )

    @property
    def features(self) -> list[np.ndarray]:
        """float64[N_i, d] of each worker."""
        return [shard.features for shard in self.shards]

    def smoothness(self, *, pooled: bool = True) -> Smoothness:
        """L and L_i; see `smoothness_constants`."""
        return smoothness_constants(
            self.features, self.loss, self.regulariser, self.lam, pooled=pooled
        )

    def pl_constant(self) -> float:
        """mu; see `pl_constant`."""
        return pl_constant(self.features, self.loss, self.regulariser, self.lam)

    def value(self, worker: int, x: np.ndarray) -> float:
        """f_worker(x), for x float[d]."""
        features, labels = self.shards[worker]
        scores = features @ x
        if self.loss == "logistic":
            losses = np.logaddexp(0, -labels * scores)  # log(1 + exp(.)) without overflow
        else:
            losses = (scores - labels) ** 2 / 2
        return float(losses.mean() + self._penalty(x))

    def gradient(self, worker: int, x: np.ndarray, step: int = 0) -> np.ndarray:
        """grad f_worker(x), float64[d]; the step is ignored."""
        return self._gradient(*self.shards[worker], x)

    def batch_gradient(self, worker: int, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The gradient over some of the worker's rows, with the full regulariser: float64[d]."""
        features, labels = self.shards[worker]
        return self._gradient(features[rows], labels[rows], x)

    def mean_value(self, x: np.ndarray) -> float:
        """f(x)."""
        return float(np.mean([self.value(i, x) for i in range(len(self.shards))]))

    def mean_gradient(self, x: np.ndarray) -> np.ndarray:
        """grad f(x), float64[d]."""
        return np.mean([self.gradient(i, x) for i in range(len(self.shards))], axis=0)

    def _gradient(self, features: np.ndarray, labels: np.ndarray, x: np.ndarray) -> np.ndarray:
        scores = features @ x
        if self.loss == "logistic":
            # -y / (1 + exp(y s)) without overflow
            slopes = -labels * (1 - np.tanh(labels * scores / 2)) / 2
        else:
            slopes = scores - labels
        return features.T @ slopes / len(labels) + self._penalty_gradient(x)

    def _penalty(self, x: np.ndarray) -> float:
        if self.regulariser == "l2":
            return self.lam / 2 * float(x @ x)
        if self.regulariser == "nonconvex":
            return self.lam * float(np.sum(x**2 / (1 + x**2)))
        return 0.0

    def _penalty_gradient(self, x: np.ndarray) -> np.ndarray | float:
        if self.regulariser == "l2":
            return self.lam * x
        if self.regulariser == "nonconvex":
            return 2 * self.lam * x / (1 + x**2) ** 2
        return 0.0


def contiguous_shards(features: np.ndarray, labels: np.ndarray, n: int) -> list[Shard]:
    """Split rows in file order: floor(N / n) for each worker, the remainder to the last.

    Args:
        features: float64[N, d].
        labels: float64[N].
        n: number of workers, 1 to N.

    Returns:
        n shards that are views of the data.

    Raises:
        ValueError: n is out of range, or there is not one label for each row.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> shards = ef.theory.contiguous_shards(numpy.zeros((11, 2)), numpy.ones(11), 3)
        >>> [len(shard.labels) for shard in shards]
        [3, 3, 5]

    References:
        EF21 (NeurIPS 2021), the authors' `generate_data.py`.
    """
    total = len(features)
    if not 1 <= n <= total or np.shape(labels) != (total,):
        raise ValueError(
            f"got n={n} for features of shape {np.shape(features)} and labels of shape "
            f"{np.shape(labels)}, expected 1 to {total} workers and one label for each row; "
            "take fewer workers"
        )
    bounds = [i * (total // n) for i in range(n)] + [total]
    return [Shard(features[a:b], labels[a:b]) for a, b in pairwise(bounds)]


def load_libsvm(
    path: str | Path, *, num_features: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read a LIBSVM text file of two classes, plain or .gz.

    Args:
        path: lines of "label index:value ...", with indices from 1.
        num_features: d, for files in which the last features do not occur; None for the largest
            index.

    Returns:
        Features float64[N, d] and labels float64[N], the smaller label as -1, the larger as +1.

    Raises:
        FileNotFoundError: there is no such file; the message says where to get it.
        ValueError: a line is not in the format, or there are not exactly two classes.

    Example:
        >>> import ef_horovod as ef, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tiny.txt"
        >>> _ = path.write_text("1 1:0.5 3:2\\n2 2:1\\n")
        >>> ef.theory.load_libsvm(path)
        (array([[0.5, 0. , 2. ],
               [0. , 1. , 0. ]]), array([-1.,  1.]))

    References:
        Chang, Lin: LIBSVM (2011); data at www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"got {path}, expected a LIBSVM text file; get one from "
            "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets"
        )
    labels: list[float] = []
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    with _open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                _read_line(line, labels, rows, columns, values)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: {error}, expected 'label index:value ...' with "
                    "indices from 1 on; look whether the file is complete"
                ) from None
    width = max(columns, default=-1) + 1 if num_features is None else num_features
    if width < max(columns, default=-1) + 1 or width < 1:
        raise ValueError(
            f"{path} has features up to {max(columns, default=-1) + 1}, expected at most "
            f"num_features={num_features} and at least 1; leave num_features out"
        )
    features = np.zeros((len(labels), width))
    features[rows, columns] = values
    return features, _two_classes(np.array(labels), path)


def _open_text(path: Path) -> IO[str]:
    return gzip.open(path, "rt") if path.suffix == ".gz" else path.open()


def _read_line(
    line: str, labels: list[float], rows: list[int], columns: list[int], values: list[float]
) -> None:
    label, *entries = line.split("#")[0].split() or [""]
    if not label:
        return  # an empty line
    for entry in entries:
        index, value = entry.split(":")
        if int(index) < 1:
            raise ValueError(f"got index {index}")
        rows.append(len(labels))
        columns.append(int(index) - 1)
        values.append(float(value))
    labels.append(float(label))


def _two_classes(labels: np.ndarray, path: Path) -> np.ndarray:
    classes = np.unique(labels)
    if classes.size != 2:
        raise ValueError(
            f"{path} has labels {classes[:4]}, expected exactly two classes; take another data set"
        )
    return np.where(labels == classes[1], 1.0, -1.0)
