"""Hard thresholds for a budget: the average number of entries that a worker sends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Calibration(NamedTuple):
    """The threshold that `calibrate` found."""

    threshold: float
    average: float  # what run(threshold) returned
    runs: int  # number of calls


def threshold_from_budget(k: float) -> float:
    """lambda = 1 / (2 sqrt(k)) for about k entries per step: a rule of thumb for deep networks.

    It does not depend on the gradient's size. So it fits only the scale of the networks that it
    comes from (error feedback on raw gradients, learning rate outside). Use `calibrate` for other
    losses.

    Args:
        k: desired entries per worker and step, positive.

    Returns:
        The threshold, in gradient units.

    Raises:
        ValueError: k is not positive.

    Example:
        >>> import ef_horovod as ef
        >>> round(ef.theory.threshold_from_budget(11_174), 5)  # ResNet-18, 0.1 %
        0.00473

    References:
        Sahu et al.: Rethinking gradient sparsification as total error minimization (NeurIPS 2021),
        the authors' `cnn-lstm/run.sh`.
    """
    if not 0 < k < math.inf:
        raise ValueError(f"got k={k}, expected a finite positive number of entries a step")
    return 1 / (2 * math.sqrt(k))


def calibrate(
    run: Callable[[float], float],
    target: float,
    *,
    start: float = 1.0,
    limits: tuple[float, float] = (1e-12, 1e12),
    tolerance: float = 0.02,
    max_runs: int = 100,
) -> Calibration:
    """Find the threshold at which a run sends on average `target` entries per worker and step.

    The search moves from `start` by factors of 10 until the target lies between two runs. Then it
    bisects the logarithm of the threshold.

    Args:
        run: run(threshold) trains and returns the average, which must not grow with the threshold,
            up to noise within the tolerance.
        target: desired average, positive.
        start: first threshold to try, in the units of the compressed vector.
        limits: smallest and largest threshold to try.
        tolerance: allowed distance of the average from the target, as a fraction of the target.
        max_runs: largest number of calls.

    Raises:
        ValueError: arguments are out of range, an average is negative or not finite, the target
            lies outside the averages at the limits, or the average jumps over the target.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> x = numpy.linspace(0, 1, 1001)
        >>> found = ef.theory.calibrate(lambda threshold: numpy.sum(x >= threshold), target=100)
        >>> bool(abs(found.average - 100) <= 2), round(found.threshold, 1)
        (True, 0.9)

    References:
        Sahu et al. (NeurIPS 2021): hard thresholds are compared with Top-k at equal volume.
    """
    low, high = limits
    positive = min(target, low, tolerance, max_runs) > 0
    if not (positive and low <= start <= high < math.inf and target < math.inf):
        raise ValueError(
            f"got target={target}, start={start}, limits={limits}, tolerance={tolerance} and "
            f"max_runs={max_runs}, expected positive numbers with start between the limits; mind "
            "the units of start"
        )
    search = _Search(run, target, tolerance, max_runs)
    return search.bisect(*search.bracket(start, low, high))


class _Search:
    """One calibration: counts the runs and checks whether the target is met."""

    def __init__(
        self, run: Callable[[float], float], target: float, tolerance: float, max_runs: int
    ) -> None:
        self._run, self._target, self._tolerance = run, target, tolerance
        self._max_runs, self._runs = max_runs, 0
        self._seen: dict[float, float] = {}  # threshold -> average

    def bracket(self, start: float, low: float, high: float) -> tuple[float, float]:
        """Two thresholds, at most a factor 10 apart, with the target between their averages."""
        threshold = start
        down = self._average(start) < self._target  # too few entries are sent
        while not self._met(threshold):
            beyond = max(threshold / 10, low) if down else min(threshold * 10, high)
            if beyond == threshold:
                side, word = ("smallest", "only") if down else ("largest", "still")
                raise ValueError(
                    f"run({threshold:g}) sends {word} {self._seen[threshold]:g} entries at the "
                    f"{side} threshold, expected a threshold for {self._target:g}; change the "
                    "target, or widen limits="
                )
            if (self._average(beyond) < self._target) != down:
                return min(threshold, beyond), max(threshold, beyond)
            threshold = beyond
        return threshold, threshold

    def bisect(self, low: float, high: float) -> Calibration:
        while True:
            for threshold in (low, high):
                if self._met(threshold):
                    return Calibration(threshold, self._seen[threshold], self._runs)
            middle = math.sqrt(low) * math.sqrt(high)
            if not low < middle < high:
                raise ValueError(
                    f"the average jumps from {self._seen[low]:g} to {self._seen[high]:g} at "
                    f"threshold {low:.9g}, expected one within {self._tolerance:g} of the target "
                    f"{self._target:g}; raise tolerance= or take one of the two as the target"
                )
            if self._average(middle) < self._target:
                high = middle
            else:
                low = middle

    def _met(self, threshold: float) -> bool:
        return abs(self._seen[threshold] - self._target) <= self._tolerance * self._target

    def _average(self, threshold: float) -> float:
        if self._runs >= self._max_runs:
            closest = min(self._seen, key=lambda seen: abs(self._seen[seen] - self._target))
            raise ValueError(
                f"after {self._runs} runs the closest average is {self._seen[closest]:g} at "
                f"threshold {closest:.9g}, expected {self._target:g} to within "
                f"{self._tolerance:g} of it; raise tolerance= or max_runs=, or start nearer"
            )
        self._runs += 1
        average = float(self._run(threshold))
        if not 0 <= average < math.inf:
            raise ValueError(
                f"run({threshold:g}) returned {average}, expected an average number of entries; "
                "lower the step size if the run diverged"
            )
        self._seen[threshold] = average
        return average


def optimal_threshold(vectors: Sequence[np.ndarray] | np.ndarray, total: int) -> float:
    """The K-th largest magnitude of all entries of all vectors.

    For a fixed sequence x_1, ..., x_T, a hard threshold at this value has the smallest total error
    sum_t ||x_t - C(x_t)||^2 among all ways to send K entries overall. Ties are all kept, so more
    than K entries may be sent.

    Args:
        vectors: arrays of any shape, for example float32[T, d].
        total: K, from 1 to the number of entries.

    Returns:
        The threshold, in the units of the vectors; keep |x| >= threshold.

    Raises:
        ValueError: K is out of range, or a magnitude is not finite.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> x = numpy.array([[5.0, -4.0, 3.0], [1.0, 0.5, 0.0]])
        >>> ef.theory.optimal_threshold(x, total=2)  # Top-1 each would drop 4, 3 and 0.5
        4.0

    References:
        Sahu et al. (NeurIPS 2021); the statement for fixed sequences was derived again.
    """
    magnitudes = np.concatenate([np.abs(np.ravel(x)) for x in vectors] or [np.zeros(0)])
    if not 1 <= total <= magnitudes.size or not np.all(np.isfinite(magnitudes)):
        raise ValueError(
            f"got total={total} for {magnitudes.size} entries, of which "
            f"{np.count_nonzero(~np.isfinite(magnitudes))} are not finite, expected 1 to "
            f"{magnitudes.size} of finite ones; the budget is for all steps together"
        )
    place = magnitudes.size - total
    return float(np.partition(magnitudes, place)[place])


def dropped_error(vectors: Sequence[np.ndarray] | np.ndarray, threshold: float) -> float:
    """Total error sum_t ||x_t - C(x_t)||^2 of a hard threshold: the sum of all squares below it.

    Args:
        vectors: arrays of any shape.
        threshold: entries with |x| >= threshold are kept.

    Returns:
        The sum, in the square of the vectors' units.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> ef.theory.dropped_error(numpy.array([[5.0, -4.0, 3.0], [1.0, 0.5, 0.0]]), 4.0)
        10.25

    References:
        Sahu et al. (NeurIPS 2021), who minimise it.
    """
    magnitudes = [np.abs(np.asarray(x, np.float64)) for x in vectors]
    return float(sum(np.sum(np.square(m[m < threshold])) for m in magnitudes))
