"""Methods on workers that live in this process: real payloads, no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ef_horovod import exchange as exchanges
from ef_horovod.arrays import Array, namespace
from ef_horovod.compressors.base import Payload
from ef_horovod.errors import NonFiniteError, UnsupportedError
from ef_horovod.keys import Key
from ef_horovod.methods.base import Method
from ef_horovod.transports.local import local_group

Gradient = Callable[[int, Array, int], Array]


@dataclass
class Run:
    """What `simulate` returns.

    Attributes:
        x: the last iterate, in x0's framework, shape and dtype.
        history: one dict a step: "step", "bytes_sent" (per worker, so far), "direction_norm", and
            what `observe` returned, under its names.
        bytes_sent: by each worker, in total: payloads to every other worker, as a gather sends
            them, or the ring's share of a sum for linear compressors.
        states: the workers' states after the last step, for tests and plots.
    """

    x: Array
    history: list[dict[str, Any]] = field(default_factory=list)
    bytes_sent: int = 0
    states: list[Any] = field(default_factory=list)


def simulate(
    method: Method,
    gradient: Gradient,
    x0: Array,
    *,
    workers: int,
    steps: int,
    step_size: float | Callable[[int], float],
    seed: int = 0,
    exchange: str = "auto",
    observe: Callable[[Array], dict[str, Any]] | None = None,
) -> Run:
    """Minimise with `x <- x - step_size * direction`, each worker sending real payloads.

    Args:
        method: error-feedback method with its compressor.
        gradient: `gradient(worker, x, step)` returns that worker's gradient at x, like x.
        x0: start, of any shape, NumPy or torch; not changed.
        workers: number of workers n >= 1.
        steps: number of rounds.
        step_size: a number, or a function of the step.
        seed: of random compressors.
        exchange: "auto", "gather", "reduce" or "dense", as over a network.
        observe: called with each new x; what it returns goes to the history.

    Raises:
        NonFiniteError: a gradient, or the sum of them, is not finite; names the step.
        ValueError, TypeError: arguments out of range or a gradient of another shape.

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
    xp = namespace(x0)
    like = xp.like(x0)
    flat = xp.flat_float32(x0)
    x = xp.detached(x0) * 1  # a copy, should gradient() change x in place
    endpoints = local_group(workers)
    kind = exchanges.choose(exchange, method)
    kind = "reduce" if kind == "dense" else kind  # the same sum, of payloads
    inits = [method.init(flat, workers) for _ in range(workers)]
    states, server = [worker for worker, _ in inits], inits[0][1]
    run = Run(x)
    for step in range(steps):
        waits, pushed = [], []
        for i, endpoint in enumerate(endpoints):
            g = _gradient(xp, gradient, i, x, step, tuple(like.shape))
            key = Key(seed, step, 0, i, workers)
            message, state = _push(method, states[i], g, key)
            waits.append(
                exchanges.start(kind, endpoint, f"step{step}", message, sized=method.sized)
            )
            pushed.append(state)
        messages = waits[0]()
        if any(message.is_skip for message in messages):
            raise NonFiniteError(
                f"step {step}: the workers' messages have no finite sum, expected finite numbers; "
                "lower step_size"
            )
        aggregate, server = method.reduce(server, messages, key.of_server())
        pulled = [method.pull(state, aggregate) for state in pushed]
        states = [state for _, state in pulled]
        direction = xp.restore(pulled[0][0], like)
        # A Python float, for a NumPy one would make a float32 x a float64 one.
        x = x - float(step_size(step) if callable(step_size) else step_size) * direction
        run.bytes_sent = endpoints[0].bytes_sent
        entry = {
            "step": step,
            "bytes_sent": run.bytes_sent,
            "direction_norm": float(np.sqrt(xp.squared_norm(pulled[0][0]))),
        }
        run.history.append(entry | (observe(x) if observe else {}))
    run.x, run.states = x, states
    return run


def _push(method: Method, state: Any, gradient: Array, key: Key) -> tuple[Payload, Any]:
    try:
        return method.push(state, gradient, key)
    except NonFiniteError as error:
        raise NonFiniteError(f"worker {key.rank}, step {key.step}: {error}") from None


def _gradient(
    xp: Any, gradient: Gradient, worker: int, x: Array, step: int, shape: tuple[int, ...]
) -> Array:
    """A worker's gradient as float32[d] in memory of its own."""
    g = gradient(worker, x, step)
    if tuple(g.shape) != shape:
        raise ValueError(
            f"gradient({worker}, x, {step}) has shape {tuple(g.shape)}, expected {shape}; "
            "return one number for each of x"
        )
    return xp.flat_float32(g * 1)
