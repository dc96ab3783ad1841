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


def require_server_compressor(method: Any, *, optional: bool = True) -> None:
    """Raise unless `method.server_compressor` is a compressor, or None if `optional`.

    Raises:
        UnsupportedError: it is something else.
    """
    if isinstance(method.server_compressor, Compressor) or (
        optional and method.server_compressor is None
    ):
        return
    name = type(method).__name__
    raise UnsupportedError(
        f"{name} got server_compressor={method.server_compressor!r}, expected a compressor for the "
        f"aggregator's answers; write for example {name}(TopK(ratio=0.01), "
        "server_compressor=TopK(ratio=0.01))"
    )
