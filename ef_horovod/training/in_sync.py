"""Checks by hash that the parameters are equal on all ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from ef_horovod.errors import OutOfSyncError


def digest_of(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """uint8[32]: a hash of all bits."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return np.frombuffer(sha.digest(), np.uint8).copy()


def require_equal(digests: Sequence[np.ndarray], way_out: str) -> None:
    """Raise unless all ranks' digests are equal.

    Args:
        digests: of each rank's parameters, in rank order.
        way_out: advice for the error message, specific to the framework.

    Raises:
        OutOfSyncError: they differ.
    """
    other = next((r for r, d in enumerate(digests) if not np.array_equal(d, digests[0])), None)
    if other is not None:
        raise OutOfSyncError(
            f"the parameters of rank 0 and rank {other} differ, expected the same bits on all "
            f"ranks; {way_out}"
        )
