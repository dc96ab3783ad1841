"""Workers for the experiments: processes under mpirun, or all of them in this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import ef_horovod as ef
from ef_horovod.channel import Channel, finish_step
from ef_horovod.estimators import Estimator
from ef_horovod.schedules import value_at

Observe = Callable[[np.ndarray], dict[str, Any]]


class Workers:
    """Runs methods; what `launch/reproduce` chose decides where.

    Args:
        transport: of this MPI job, whose ranks are the workers; None for `ef.simulate`.
    """

    def __init__(self, transport: Any = None) -> None:
        self.transport = transport

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes."""
        return self.transport is None or self.transport.rank == 0

    def sum(self, number: float) -> float:
        """A number of every rank, added up; itself where one process has all workers."""
        if self.transport is None:
            return number
        return float(self.transport.allreduce("sum", np.array([number]))()[0])

    def run(
        self,
        method: ef.Method,
        gradient: Callable[[int, np.ndarray, int], np.ndarray],
        x0: np.ndarray,
        *,
        workers: int,
        steps: int,
        step_size: float | ef.Decay | Callable[[int], float],
        observe: Observe,
        seed: int = 0,
        estimator: Estimator = Estimator(),  # noqa: B008 - frozen
        stop: Callable[[dict[str, Any]], bool] = lambda entry: False,
    ) -> list[dict[str, Any]]:
        """History of `x <- x - step_size * direction`: one dict a step.

        Args:
            method: with its compressor.
            gradient: gradient(worker, x, step).
            x0: float64[d].
            workers: n; under mpirun the number of ranks.
            steps: at most.
            step_size: a number, a schedule or a function of the step.
            observe: of the new x, for the history.
            seed: of random compressors.
            estimator: what workers say in place of their gradients.
            stop: looks at the last entry of the history.

        Returns:
            Entries with "step", "bytes_sent" (by a worker so far) and what `observe` gave.
        """
        if self.transport is None:
            run = ef.simulate(
                method,
                gradient,
                x0,
                workers=workers,
                steps=steps,
                step_size=step_size,
                seed=seed,
                estimator=estimator,
                observe=observe,
            )
            return run.history
        estimate = _Estimate(estimator, gradient, self.transport.rank)
        return self._run_on_ranks(method, estimate, x0, steps, step_size, observe, seed, stop)

    def _run_on_ranks(
        self,
        method: ef.Method,
        estimate: _Estimate,
        x0: np.ndarray,
        steps: int,
        step_size: Any,
        observe: Observe,
        seed: int,
        stop: Any,
    ) -> list[dict[str, Any]]:
        transport = self.transport
        channel = Channel("x", np.zeros(x0.size, np.float32), method, transport, seed=seed)
        x, history = x0.copy(), []
        for step in range(steps):
            channel.gradient[:] = estimate(x, step)
            channel.start(step)
            directions = finish_step([channel])
            if directions is None:
                raise ef.NonFiniteError(f"step {step}: a gradient was not finite; lower step_size")
            size = step_size(step) if callable(step_size) else value_at(step_size, step)
            x = x - size * directions[0]
            history.append({"step": step, "bytes_sent": channel.stats().bytes_out, **observe(x)})
            if stop(history[-1]):
                break
        return history


class _Estimate:
    """One worker's estimates, as `ef.simulate` makes them for all."""

    def __init__(self, estimator: Estimator, gradient: Any, worker: int) -> None:
        self._estimator, self._gradient, self._worker = estimator, gradient, worker
        self._before: np.ndarray | None = None
        self._last: np.ndarray | None = None

    def __call__(self, x: np.ndarray, step: int) -> np.ndarray:
        before = x if self._before is None else self._before
        points = self._estimator.points(x, before, step)
        gradients = [self._gradient(self._worker, point, step) for point in points]
        self._before, self._last = x, self._estimator.combine(gradients, self._last, step)
        return self._last
