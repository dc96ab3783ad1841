"""Checks before the first step that all ranks have the same config.

Ranks with different configs, parameter names or shapes would hang, or mix their data without an
error. Each rank lists its facts, one per line. The ranks compare digests of these lists. If they
differ, all ranks find the first difference and name it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from ef_horovod.errors import ConfigMismatchError
from ef_horovod.transports.base import Transport

_NOTHING = "nothing there"


def require_same_config(transport: Transport, facts: Sequence[str], name: str = "guard") -> None:
    """Compare this rank's facts with those of all other ranks; collective.

    Args:
        transport: to the other ranks.
        facts: one line each, in the same order on all ranks.
        name: of the collectives used.

    Raises:
        ConfigMismatchError: on every rank; names two ranks and their first difference.
    """
    digests = _gather(transport, f"{name}.digest", _digest(facts))
    other = next((rank for rank, d in enumerate(digests) if d != digests[0]), None)
    if other is None:
        return
    here, there = _first_difference(transport, facts, other, name)
    raise ConfigMismatchError(
        f"rank 0 has {here} and rank {other} has {there}, expected the same on all ranks; "
        "give all ranks the same model, the same compression and the same options"
    )


def first_difference(first: Sequence[str], second: Sequence[str]) -> tuple[str, str]:
    """The first pair of lines in which two lists of facts differ."""
    pairs = zip_longest(first, second, fillvalue=_NOTHING)
    return next((here, there) for here, there in pairs if here != there)


def _first_difference(
    transport: Transport, facts: Sequence[str], other: int, name: str
) -> tuple[str, str]:
    """The same for the facts of rank 0 and another one; collective over all ranks.

    Bisection keeps the number of bytes independent of the model's size.
    """
    counts = _gather(transport, f"{name}.count", np.array([len(facts)], "<u8").view(np.uint8))
    same, bound = 0, min(int.from_bytes(counts[rank], "little") for rank in (0, other))
    while same < bound:  # the first `same` facts are equal
        middle = (same + bound + 1) // 2
        digests = _gather(transport, f"{name}.digest", _digest(facts[:middle]))
        if digests[0] == digests[other]:
            same = middle
        else:
            bound = middle - 1
    line = np.frombuffer("\n".join(facts[same : same + 1]).encode(), np.uint8)
    lengths = _gather(transport, f"{name}.count", np.array([line.size], "<u8").view(np.uint8))
    padded = np.zeros(max(int.from_bytes(length, "little") for length in lengths) + 1, np.uint8)
    padded[: line.size] = line
    lines = _gather(transport, f"{name}.fact", padded)
    here, there = (lines[rank].rstrip(b"\0").decode() or _NOTHING for rank in (0, other))
    return here, there


def _digest(facts: Sequence[str]) -> np.ndarray:
    return np.frombuffer(hashlib.sha256("\n".join(facts).encode()).digest(), np.uint8).copy()


def _gather(transport: Transport, name: str, data: np.ndarray) -> list[bytes]:
    return [part.tobytes() for part in transport.allgather(name, data)()]
