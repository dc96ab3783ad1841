"""Workers for the experiments: on the ranks of an MPI job, or all of them in this process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import ef_horovod as ef
from ef_horovod.methods.estimators import Estimator
from experiments.counting import Counts, counted
from experiments.errors import Refused

Observe = Callable[[np.ndarray], dict[str, Any]]


class Workers:
    """Runs methods; what `launch/reproduce` chose decides where.

    Args:
        transport: of this MPI job, whose ranks share the workers; None for one process.
    """

    def __init__(self, transport: Any = None) -> None:
        self.transport = transport

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes."""
        return self.transport is None or self.transport.rank == 0

    def sum(self, number: float) -> float:
        """A number of every rank, added up; itself where one process has all workers."""
        return float(self._sums(np.array([number], np.float64))[0])

    def map(
        self, function: Callable[[np.ndarray], float], points: Sequence[np.ndarray]
    ) -> np.ndarray:
        """function(point) of each, float64[m], the same on all ranks, which share the work."""
        size, rank = (1, 0) if self.transport is None else self._place()
        values = np.zeros(len(points))
        for i in range(rank, len(points), size):
            values[i] = function(points[i])
        return self._sums(values)

    def part(self, count: int) -> Workers | None:
        """The first `count` workers by themselves; None on a rank that is not one of them.

        Collective: all ranks call it. In one process there is nothing to leave out.

        Raises:
            Refused: the job has fewer ranks.
        """
        if self.transport is None:
            return self
        from mpi4py import MPI

        from ef_horovod.transports.mpi import MPITransport

        rank, size = self.transport.rank, self.transport.size
        if size < count:
            raise Refused(
                f"got {size} ranks, expected at least {count}; start as many with mpirun -np"
            )
        inside = MPI.COMM_WORLD.Split(0 if rank < count else MPI.UNDEFINED, rank)
        return Workers(MPITransport(inside)) if rank < count else None

    def run(
        self,
        method: ef.Method,
        gradient: Callable[[int, np.ndarray, int], np.ndarray],
        x0: np.ndarray,
        *,
        workers: int,
        steps: int,
        step_size: float | ef.Decay | Callable[[int], float],
        observe: Observe = lambda x: {},
        seed: int = 0,
        estimator: Estimator = Estimator(),  # noqa: B008 - frozen
        stop: Callable[[dict[str, Any]], bool] | None = None,
    ) -> list[dict[str, Any]]:
        """History of `x <- x - step_size * direction`: one dict a step.

        Args:
            method: with its compressor.
            gradient: gradient(worker, x, step).
            x0: float64[d] or float32[d].
            workers: n; where there are fewer than ranks, rank 0 has all of them.
            steps: at most.
            step_size: a number, a schedule or a function of the step.
            observe: of the new x, for the history; every rank calls it, so what takes long is
                better left to `map`.
            seed: of random compressors.
            estimator: what workers say in place of their gradients.
            stop: looks at the last entry of the history.

        Returns:
            Entries with what `observe` gave, "step", "bytes_sent" (by a worker so far, to all
            others), and what a worker and a server would have sent each other so far, on average
            over workers: "bytes_up" and "bytes_down".
        """
        if self.transport is not None and workers < self.transport.size:
            return self.from_lead(
                lambda: Workers().run(
                    method,
                    gradient,
                    x0,
                    workers=workers,
                    steps=steps,
                    step_size=step_size,
                    observe=observe,
                    seed=seed,
                    estimator=estimator,
                    stop=stop,
                )
            )
        counts, totals = Counts(), []

        def watch(x: np.ndarray) -> dict[str, Any]:
            totals.append((counts.up, counts.down))
            return observe(x)

        history = ef.simulate(
            counted(method, counts),
            gradient,
            x0,
            workers=workers,
            steps=steps,
            step_size=step_size,
            seed=seed,
            estimator=estimator,
            observe=watch,
            stop=stop,
            transport=self.transport,
        ).history
        self._add_counts(history, np.array(totals), workers)
        return history

    def _add_counts(
        self, history: list[dict[str, Any]], both_ways: np.ndarray, workers: int
    ) -> None:
        """What is known of this rank's workers becomes an average over all."""
        totals = self._sums(both_ways.reshape(-1)).reshape(-1, 2) / workers
        sent = self._sums(np.array([float(entry["bytes_sent"]) for entry in history]))
        for i, entry in enumerate(history):
            entry["bytes_sent"] = int(sent[i]) // (self.transport.size if self.transport else 1)
            entry["bytes_received"] = entry["bytes_sent"]  # on average: each goes to one of them
            entry["bytes_up"], entry["bytes_down"] = totals[i]

    def _sums(self, numbers: np.ndarray) -> np.ndarray:
        """float64[m] of every rank, added up."""
        if self.transport is None or numbers.size == 0:
            return numbers
        return self.transport.allreduce("numbers", numbers)()

    def _place(self) -> tuple[int, int]:
        return self.transport.size, self.transport.rank

    def from_lead(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, on all ranks; or its error, so that nobody waits for it."""
        if self.transport is None:
            return make()
        data = pickle.dumps(_outcome(make)) if self.leads else b"-"
        first, *_ = self.transport.allgather("from lead", np.frombuffer(data, np.uint8))()
        made, error = pickle.loads(first.tobytes())
        if error is not None:
            raise error
        return made


def _outcome(make: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return make(), None
    except Exception as error:
        return None, error
