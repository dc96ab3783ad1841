"""Clipping of a worker's gradient before it enters a momentum."""

from __future__ import annotations

import math
from typing import Any

from ef_horovod.arrays import Array, namespace
from ef_horovod.common.options import keep_number


def keep_clip(owner: Any) -> None:
    """Check the field `clip` of a frozen dataclass: a norm or None.

    Raises:
        ValueError: it is something else.
    """
    what, way_out = "the norm of the clipped sum over workers", "leave it out for no clipping"
    keep_number(owner, "clip", "(0, inf)", way_out, what, optional=True)


def clip_norm(x: Array, norm: float) -> None:
    """Scale float32[d] x down to a norm of at most `norm`, if it is finite."""
    xp = namespace(x)
    excess = math.sqrt(xp.squared_norm(x)) / norm
    if 1 < excess < math.inf:
        xp.divide(x, excess, out=x)
