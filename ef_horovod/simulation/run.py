"""Runs methods with all workers in this process: real payloads, no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ef_horovod.arrays import Array, float_namespace, namespace
from ef_horovod.common.options import number, seed_of, whole
from ef_horovod.common.schedules import Schedule, Scheduled, value_at
from ef_horovod.errors import UnsupportedError
from ef_horovod.methods.base import Method
from ef_horovod.methods.estimators import Estimator
from ef_horovod.simulation.workers import SimulatedWorkers, choice_of
from ef_horovod.training.options import check_options
from ef_horovod.transports.base import Transport

Gradient = Callable[[int, Array, int], Array]


@dataclass
class Run:
    """The result of `simulate`.

    Attributes:
        x: the last iterate, in x0's framework, shape and dtype.
        history: one dict per step: "step", "bytes_sent" and "bytes_received" (so far),
            "direction_norm", and the entries that `observe` returned.
        bytes_sent: total per worker, mean over workers. A gather sends messages to all other
            workers, a sum for linear compressors the ring's share, exchange="server" one message
            per step.
        bytes_received: likewise; with exchange="server" the server's answers.
        states: the workers' states after the last step, for tests and plots; one per slice with
            exchange="double_pass", None where the gradient itself is summed.
    """

    x: Array
    history: list[dict[str, Any]] = field(default_factory=list)
    bytes_sent: int = 0
    bytes_received: int = 0
    states: list[Any] = field(default_factory=list)


def simulate(
    method: Method,
    gradient: Gradient,
    x0: Array,
    *,
    workers: int,
    steps: int,
    step_size: Scheduled | Callable[[int], float],
    seed: int = 0,
    name: str = "",
    exchange: str = "auto",
    dense_steps: int = 0,
    estimator: Estimator = Estimator(),  # noqa: B008 - frozen
    observe: Callable[[Array], dict[str, Any] | None] | None = None,
    stop: Callable[[dict[str, Any]], bool] | None = None,
    transport: Transport | None = None,
    ranks_per_node: int = 1,
) -> Run:
    """Minimise with `x <- x - step_size * direction`; workers send real payloads.

    Args:
        method: error-feedback method with its compressor.
        gradient: `gradient(worker, x, step)` returns that worker's gradient at x, like x. With an
            estimator that needs two points, the sample must follow from (worker, step) alone.
        x0: start, of any shape: NumPy, torch or an eager TensorFlow tensor; not changed.
        workers: number of workers n >= 1.
        steps: number of rounds.
        step_size: a number, a schedule such as `Decay`, or a function of the step.
        seed: of random compressors.
        name: of the vector; random draws depend on it, as on a bucket's name ("bucket.0") in a job.
        exchange: "gather" or "reduce" between workers, or "auto" for one of the two. "server": one
            message up and one answer down per worker; the answer is a float32 vector unless the
            method compresses both ways. These have the same iterates, but different byte counts.
            "double_pass": worker j reduces slice j of x, named NAME/j. The compressor sees slices,
            so the iterates differ. "hierarchical": among nodes of `ranks_per_node` workers each;
            bytes are those between nodes. "auto:NETWORK" is refused, because no time passes here.
        dense_steps: number of first steps that send uncompressed averages. Error feedback then
            starts from zero, and `MomentumCorrection` from its momentum.
        estimator: computes the method's input from a worker's gradients.
        observe: called with x after every step; a dict that it returns is added to the history.
        stop: called with the last entry of the history; True ends the run after this step.
        transport: of an MPI job. Its ranks share the workers, and all call this with the same
            arguments. Each returns the same x and history, and the states of its own workers. The
            iterates are bitwise the same if messages are gathered, and the same up to rounding if
            they are summed in flight. None: all workers are in this process.
        ranks_per_node: workers on each node with exchange="hierarchical".

    Raises:
        UnsupportedError: `method` is not a method, the estimator or the exchange does not fit it,
            a server, slices or nodes over a transport, dense steps with a server, or an exchange
            whose `start` waits.
        NonFiniteError: a gradient was not finite; names the step.
        ValueError, TypeError: arguments out of range, or a gradient of another shape.

    Example:
        >>> import ef_horovod as ef, numpy
        >>> targets = numpy.array([[1.0, 2.0], [3.0, -4.0]])
        >>> run = ef.simulate(ef.EF21(ef.TopK(k=1)), lambda i, x, t: x - targets[i],
        ...                   numpy.zeros(2), workers=2, steps=200, step_size=0.3)
        >>> run.x.round(3)
        array([ 2., -1.])
    """
    if not isinstance(method, Method):
        raise UnsupportedError(
            f"simulate got {method!r}, expected a method; write for example EF21(TopK(ratio=0.01))"
        )
    seed = _checked_options(**locals())
    estimator.require_fit(method)
    xp = float_namespace(x0, "x0")
    like = xp.like(x0)
    # NumPy's arithmetic on an array without dimensions returns a scalar, not an array.
    array = np.asarray if isinstance(x0, np.ndarray) else lambda x: x
    x = before = array(xp.detached(x0) * 1)  # a copy, because gradient() may change x in place
    if len(x0.shape) > 1:  # one dimension: any vector, not a parameter with that shape
        method = method.for_shapes([tuple(x0.shape)])
    choice = choice_of(exchange, method, transport, dense_steps)
    group = SimulatedWorkers(
        choice,
        xp.flat_float32(x0),
        workers,
        seed=seed,
        name=name,
        transport=transport,
        per_node=ranks_per_node,
    )
    crew = [_Worker(rank, gradient, estimator) for rank in group.ranks]
    run = Run(x)
    for step in range(steps):
        direction = group.step((one.estimate(x, before, step) for one in crew), step)
        # A Python float, because a NumPy float would turn a float32 x into float64.
        before, x = x, array(x - _at(step_size, step) * xp.restore(direction, like))
        entry = {
            "step": step,
            "bytes_sent": group.bytes_sent,
            "bytes_received": group.bytes_received,
            "direction_norm": float(np.sqrt(xp.squared_norm(direction))),
        }
        run.history.append(entry | _observed(observe, x, entry))
        if stop and stop(run.history[-1]):
            break
    run.x, run.states = x, group.states
    run.bytes_sent, run.bytes_received = group.bytes_sent, group.bytes_received
    return run


def _checked_options(**given: Any) -> int:
    """Raise for options that would fail later or be misread; returns the seed."""
    check_options("simulate", **given)
    whole("simulate", "workers", given["workers"], 1, None, "2 is the least that shows an exchange")
    per_node = given["ranks_per_node"]
    whole("simulate", "ranks_per_node", per_node, 1, None, "1 is a node for each worker")
    if given["workers"] % per_node:
        raise ValueError(
            f"simulate got ranks_per_node={per_node} with workers={given['workers']}, expected as "
            f"many workers on each node; take a multiple of {per_node} workers"
        )
    whole("simulate", "steps", given["steps"], 0, None, "1 is one round")
    step_size, estimator = given["step_size"], given["estimator"]
    if not isinstance(step_size, Schedule) and not callable(step_size):
        also = ", or a schedule or a function of the step"
        number("simulate", "step_size", step_size, "(-inf, inf)", "0.1 is a start", also=also)
    if not isinstance(estimator, Estimator):
        raise UnsupportedError(
            f"simulate got estimator={estimator!r}, expected an estimator such as STORM(0.1); "
            "leave it out for gradients as they are"
        )
    for name in ("observe", "stop"):
        if given[name] is not None and not callable(given[name]):
            raise UnsupportedError(
                f"simulate got {name}={given[name]!r}, expected a function; leave it out for none"
            )
    return seed_of("simulate", given["seed"])


class _Worker:
    """One worker's gradients, and its last estimate if the estimator needs it."""

    def __init__(self, rank: int, gradient: Gradient, estimator: Estimator) -> None:
        self._rank, self._gradient, self._estimator = rank, gradient, estimator
        self._last: Array | None = None

    def estimate(self, x: Array, before: Array, step: int) -> Array:
        """The method's input at x_t = x: float32[d], which may share the gradient's memory."""
        points = self._estimator.points(x, before, step)
        gradients = [_gradient(self._gradient, self._rank, point, step, x) for point in points]
        estimate = self._estimator.combine(gradients, self._last, step)
        if self._estimator.needs_last:
            self._last = estimate
        return namespace(x).flat_float32(estimate)


def _observed(observe: Any, x: Array, entry: dict[str, Any]) -> dict[str, Any]:
    """The entries that `observe` adds; None adds none."""
    found = observe(x) if observe else None
    if found is None:
        return {}
    if not isinstance(found, dict) or found.keys() & entry:
        raise UnsupportedError(
            f"simulate got {found!r} from observe, expected None or a dict with other keys than "
            f"{list(entry)}; return for example {{'loss': loss}}"
        )
    return found


def _at(step_size: Scheduled | Callable[[int], float], step: int) -> float:
    if not callable(step_size):
        return value_at(step_size, step)
    way_out = "return a number, as of lambda step: 0.1"
    return float(number("simulate", f"step_size({step})", step_size(step), "(-inf, inf)", way_out))


def _gradient(gradient: Gradient, worker: int, point: Array, step: int, like: Array) -> Array:
    """A worker's gradient, with framework and shape checked."""
    g = gradient(worker, point, step)
    what = f"gradient({worker}, x, {step})"
    if float_namespace(g, what) is not namespace(like):
        raise TypeError(
            f"{what} is a {type(g).__name__}, expected one like x0, a {type(like).__name__}; "
            "return an array of the same framework"
        )
    if tuple(g.shape) != tuple(like.shape):
        raise ValueError(
            f"{what} has shape {tuple(g.shape)}, expected "
            f"{tuple(like.shape)}; return one number for each of x"
        )
    return g
