"""How many entries a sparsifier keeps: shared by those that take a ratio or a count."""

from __future__ import annotations


def kept(ratio: float | None, k: int | None, d: int) -> int:
    """Entries kept of d: k, or max(1, floor(ratio * d)); never more than d."""
    if k is None:
        assert ratio is not None
        k = max(1, int(ratio * d))
    return min(k, d)


def require_ratio(name: str, ratio: float) -> None:
    """Raise ValueError unless ratio is a fraction in (0, 1]."""
    if not 0 < ratio <= 1:
        raise ValueError(
            f"{name} got ratio={ratio}, expected a kept fraction in (0, 1]; "
            "0.01 keeps one entry in a hundred"
        )
