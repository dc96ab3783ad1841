"""Checks of a compressor's claims: its constants, its linearity and its random draws."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ef_horovod.arrays.keys import Key
from ef_horovod.compressors.base import Compressor
from ef_horovod.compressors.registry import compressor_of
from ef_horovod.testing.tools import KEY, LENGTHS, ROUNDING, is_deterministic, norm, require

_DRAWS = 2000
_CONFIDENCE = math.log(2e9)  # a true claim fails in one of 10**9 checks


def check_properties(compressor: Compressor) -> None:
    """The compressor is registered, equals itself, and makes possible claims."""
    kind = type(compressor)
    wire_id = getattr(kind, "wire_id", None)
    registered = wire_id is not None and compressor_of(wire_id) is kind
    require(registered, compressor, "is not registered under its wire_id")
    same = compressor == compressor and hash(compressor) == hash(compressor)
    require(same, compressor, "does not equal itself; make it a frozen dataclass")
    listed = all(isinstance(example, Compressor) for example in kind.examples())
    require(listed, compressor, "lists something else than compressors in examples()")
    for d in (1, 9, 1000):
        delta, omega = compressor.contraction(d), compressor.variance(d)
        possible = delta is None or 0 < delta <= 1
        require(possible, compressor, f"claims contraction({d}) = {delta}, not in (0, 1]")
        stated = (omega is not None) == compressor.unbiased
        require(stated, compressor, f"claims unbiased={compressor.unbiased} and variance {omega}")
        require(omega is None or omega >= 0, compressor, f"claims variance({d}) = {omega}")


def check_keys(compressor: Compressor) -> None:
    """Draws differ between ranks if and only if they are not shared."""
    x = np.random.default_rng(6).normal(size=2000).astype(np.float32)
    if is_deterministic(compressor, x):
        return
    sent = [bytes(compressor.compress(x, KEY._replace(rank=rank))) for rank in range(3)]
    shared = getattr(compressor, "shared", compressor.allreducible)
    if shared is None:  # depends on the compressor's parts
        return
    if shared:
        require(len(set(sent)) == 1, compressor, "draws differently on ranks though it is shared")
    else:
        require(len(set(sent)) == 3, compressor, "draws the same on all ranks: not shared")


def check_contraction(compressor: Compressor) -> None:
    """E||C(x) - x||^2 <= (1 - delta) ||x||^2, tested by draws."""
    for d in (9, 64):
        delta = compressor.contraction(d)
        assert delta is not None
        for x, decoded in _draws(compressor, d, rest=1e-3):
            losses = ((decoded - x) ** 2).sum(1) / (x @ x)
            low = losses.mean() - _uncertainty(losses)
            message = f"loses at least {low:.4g} ||x||^2 on average, claims {1 - delta:.4g} (d={d})"
            require(low <= 1 - delta + ROUNDING, compressor, message)


def check_unbiased(compressor: Compressor) -> None:
    """E C(x) = x and E||C(x) - x||^2 <= omega ||x||^2, tested by draws."""
    for d in (9, 64):
        omega = compressor.variance(d)
        assert omega is not None
        # With a smaller rest, 2000 draws would miss rare events (probability 1 in 10,000).
        for x, decoded in _draws(compressor, d, rest=0.1):
            signs = np.random.default_rng(7).choice([-1.0, 1.0], size=d)
            for direction in (x, np.sign(x), signs * np.abs(x)):
                offsets = (decoded - x) @ direction / (x @ x)
                off, limit = abs(offsets.mean()), _uncertainty(offsets) + ROUNDING
                message = f"is biased by {off:.4g} of x along a direction (d={d})"
                require(off <= limit, compressor, message)
            losses = ((decoded - x) ** 2).sum(1) / (x @ x)
            low = losses.mean() - _uncertainty(losses)
            message = f"has a variance of at least {low:.4g}, claims {omega:.4g} (d={d})"
            require(low <= omega + ROUNDING, compressor, message)


def check_linear(compressor: Compressor) -> None:
    """The sum of two ranks' summands is the payload of the sum."""
    rng = np.random.default_rng(8)
    for d in LENGTHS:
        x, y = rng.normal(size=(2, d)).astype(np.float32)
        ours = compressor.compress(x, KEY)
        theirs = compressor.compress(y, KEY._replace(rank=2))
        values = ours.summands()
        require(values.dtype == np.float32, compressor, f"has summands of {values.dtype}")
        shared = np.shares_memory(values, ours.data) or not values.size
        require(shared, compressor, "summands() is a copy, expected a view of the payload")
        room = compressor.skip(x, KEY).summands().size
        message = f"skip has {room} summands, a message with the same key {values.size}"
        require(room == values.size, compressor, message)
        size = norm(ours.decompress()) + norm(theirs.decompress())
        values += theirs.summands()
        expected = compressor.compress(x + y, KEY).decompress()
        off = norm(ours.decompress().astype(float) - expected)
        require(off <= ROUNDING * size, compressor, f"is not linear: C(x) + C(y) is off by {off:g}")


def _draws(compressor: Compressor, d: int, rest: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A few x of length d, each with C(x) for many keys: float64[d] and float64[draws, d].

    One of them has a single large entry; all its other entries are `rest`.
    """
    rng = np.random.default_rng(d)
    for x in (rng.normal(size=d), np.ones(d), (np.arange(d) == 2) + rest):
        x = x.astype(np.float32)
        # An unbiased compressor that seems deterministic has rare draws.
        once = not compressor.unbiased and is_deterministic(compressor, x)
        count = 1 if once else _DRAWS
        parts = [compressor.compress(x, Key(9, step)).decompress() for step in range(count)]
        yield x.astype(float), np.array(parts, float)


def _uncertainty(samples: np.ndarray) -> float:
    """Error bound of the samples' mean: empirical Bernstein (Maurer, Pontil 2009)."""
    if len(samples) == 1:
        return 0.0
    spread = math.sqrt(2 * samples.var(ddof=1) * _CONFIDENCE / len(samples))
    return spread + 7 * float(np.ptp(samples)) * _CONFIDENCE / (3 * (len(samples) - 1))
