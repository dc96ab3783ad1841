"""The gradients of test_same_numbers.py: they follow from rank and step alone."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from ef_horovod import Identity, Method, NoFeedback
from ef_horovod.testing.pairs import every_method, selection

sys.path.append(str(Path(__file__).parents[2]))  # tests/, for sampling.py
from sampling import covering

SHAPE, SEED = (40, 30), 5  # enough elements for adapters to compress them
STEPS = 8  # memories that are reset in the seventh step are used once more
IN_SLICES = selection()


def gradient(rank: int, step: int) -> np.ndarray:
    """float32 of SHAPE."""
    return np.random.default_rng((rank, step)).standard_normal(SHAPE, np.float32)


def exchanges_of(method: Method) -> list[str]:
    """All that the method can travel by; by a double pass some dozens of methods, for the time."""
    in_slices = method.sliceable and method in IN_SLICES
    return [
        "gather",
        *["reduce"] * method.allreducible,
        *["dense"] * (method == NoFeedback(Identity())),
        *["double_pass"] * in_slices,
    ]


def methods_of_servers(which: str) -> list[Method]:
    """All but those that need dense steps, which servers do not have.

    "all" of them, or of these a "sample" that has every method and every compressor.
    """
    found = [method for method in every_method() if not method.needs_dense_steps]
    return found if which == "all" else covering(found, _parts, together=1)


def _parts(method: Method) -> tuple[str, str]:
    compressor = repr(method.compressor)
    return repr(method).replace(compressor, "C"), compressor


def dense_steps_of(method: Method) -> int:
    """A few for the methods that need some."""
    return 2 if method.needs_dense_steps else 0


def cases(which: str) -> list[tuple[Method, str]]:
    """Methods and exchanges: "all" of them, or a sample.

    The sample "pairs" has every two of a method, a compressor and an exchange; of these, "singles"
    has every method and every compressor by each of its exchanges; and of these "methods" has every
    method by each.
    """
    product = [(method, exchange) for method in every_method() for exchange in exchanges_of(method)]
    if which == "all":
        return product
    pairs = covering(product, _factors)
    if which == "pairs":
        return pairs
    singles = covering(pairs, _by_each_exchange, together=1)
    if which == "singles":
        return singles
    return covering(singles, lambda case: _by_each_exchange(case)[:1], together=1)


def cases_by_nodes(which: str) -> list[tuple[Method, str]]:
    """The same for two levels: the methods that work on slices, and exchanges between nodes."""
    product = [
        (method, f"hierarchical:{exchange}")
        for method in every_method()
        if method.sliceable
        for exchange in exchanges_of(method)
        if exchange != "dense"
    ]
    return product if which == "all" else covering(product, _by_each_exchange, together=1)


def simulated_by_nodes(method: Method, exchange: str, name: str) -> np.ndarray:
    """Where the steps lead on two nodes of two ranks."""
    from ef_horovod import simulate  # ranks need none

    run = simulate(
        method,
        lambda rank, x, step: gradient(rank, step),
        np.zeros(SHAPE, np.float32),
        workers=4,
        ranks_per_node=2,
        steps=STEPS,
        step_size=1.0,
        seed=SEED,
        name=name,
        exchange=exchange,
        dense_steps=dense_steps_of(method),
    )
    return run.x


def _factors(case: tuple[Method, str]) -> tuple[str, str, str]:
    method, exchange = case
    return type(method).__name__, repr(method.compressor), exchange


def _by_each_exchange(case: tuple[Method, str]) -> tuple[tuple[str, str], tuple[str, str]]:
    method, compressor, exchange = _factors(case)
    return (method, exchange), (compressor, exchange)


def digest(x: np.ndarray) -> str:
    """Of all bits."""
    return hashlib.sha256(np.ascontiguousarray(x, np.float32).tobytes()).hexdigest()[:16]
