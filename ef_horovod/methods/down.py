"""Compressed answers of aggregators."""

from __future__ import annotations

from typing import Any

from ef_horovod.arrays import Array, namespace
from ef_horovod.compressors.base import Compressor, Payload
from ef_horovod.errors import UnsupportedError


def decoded(payload: Payload, out: Array) -> Array:
    """`out`, overwritten with the decoded payload."""
    namespace(out).fill(out, 0.0)
    payload.add_to(out)
    return out


def require_down(method: Any, *, optional: bool = True) -> None:
    """Raise unless `method.down` is a compressor, or None if `optional`.

    Raises:
        UnsupportedError: it is something else.
    """
    if isinstance(method.down, Compressor) or (optional and method.down is None):
        return
    name = type(method).__name__
    raise UnsupportedError(
        f"{name} got down={method.down!r}, expected a compressor for the aggregator's answers; "
        f"write for example {name}(TopK(ratio=0.01), down=TopK(ratio=0.01))"
    )
