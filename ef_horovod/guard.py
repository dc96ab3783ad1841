"""A check before the first step: do all ranks mean the same thing?

Ranks that disagree about the config, the parameter names or their shapes would hang, or mix their
data without an error. Each rank describes itself in one line a fact; the digests are compared, and
if they differ, all ranks learn all descriptions and name the first difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ef_horovod.errors import ConfigMismatchError
from ef_horovod.transports.base import Transport

_DESCRIPTION_NBYTES = 1 << 16  # equal on all ranks; what is longer is cut


def require_same_config(transport: Transport, facts: Sequence[str], name: str = "guard") -> None:
    """Compare this rank's facts with all others'; collective.

    Args:
        transport: to the other ranks.
        facts: one line each, in an order that is equal on all ranks.
        name: of the collectives used.

    Raises:
        ConfigMismatchError: on every rank, naming two ranks and what differs between them.
    """
    text = "\n".join(facts).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint8).copy()
    digests = [part.tobytes() for part in transport.allgather(f"{name}.digest", digest)()]
    other = next((rank for rank, d in enumerate(digests) if d != digests[0]), None)
    if other is None:
        return
    padded = np.zeros(_DESCRIPTION_NBYTES, np.uint8)
    padded[: min(len(text), padded.size)] = np.frombuffer(text, np.uint8)[: padded.size]
    descriptions = transport.allgather(f"{name}.facts", padded)()
    first, second = (
        descriptions[rank].tobytes().rstrip(b"\0").decode(errors="replace").split("\n")
        for rank in (0, other)
    )
    here, there = first_difference(first, second)
    raise ConfigMismatchError(
        f"rank 0 has {here} and rank {other} has {there}, expected the same on all ranks; "
        "give all ranks the same model, the same compression and the same options"
    )


def first_difference(first: list[str], second: list[str]) -> tuple[str, str]:
    """Where two lists of facts, one line each, begin to differ: what each of them has there."""
    for here, there in zip(first, second, strict=False):
        if here != there:
            return here, there
    longer = max(len(first), len(second))
    extra = (first if len(first) > len(second) else second)[min(len(first), len(second)) :]
    what = extra[0] if extra else f"something after the first {_DESCRIPTION_NBYTES} bytes"
    if len(first) == longer:
        return what, "nothing there"
    return "nothing there", what
