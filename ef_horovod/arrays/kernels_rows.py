"""Sums of rows, compiled by Numba; as in kernels.py: imported at the first use, deterministic."""

from __future__ import annotations

from numba import njit


@njit(cache=True, nogil=True)
def add_rows(out, places, rows):  # type: ignore[no-untyped-def]
    """out[places[i]] += rows[i], in the order of i.

    Args:
        out: float32[m, width].
        places: int64[n], each below m.
        rows: float32[n, width].
    """
    for i in range(places.size):
        place = places[i]
        for j in range(rows.shape[1]):
            out[place, j] += rows[i, j]
