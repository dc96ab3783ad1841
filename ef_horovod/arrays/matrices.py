"""Matrices that lie in a flat vector, and their factors of low rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ef_horovod.arrays import Array


class Matrix(NamedTuple):
    """A matrix a x b in C order inside a vector, and the rank r of its factors.

    M is about P Q^T. P (a x r) is its left factor and Q (b x r) its right one; both are handled as
    float32[r, a] and float32[r, b], one row for each of the r directions.
    """

    start: int  # of its a * b entries in the vector
    rows: int  # a
    columns: int  # b
    rank: int  # r, at most a and b

    @property
    def stop(self) -> int:
        """Where its entries end."""
        return self.start + self.rows * self.columns

    def side(self, *, left: bool) -> int:
        """a or b, the length of a factor's directions."""
        return self.rows if left else self.columns

    def factor_size(self, *, left: bool) -> int:
        """Entries of a factor."""
        return self.rank * self.side(left=left)


def factors_size(matrices: Sequence[Matrix], *, left: bool) -> int:
    """Entries of the factors of all matrices."""
    return sum(matrix.factor_size(left=left) for matrix in matrices)


def each_factor(
    matrices: Sequence[Matrix], factors: Array, *, left: bool
) -> Iterator[tuple[Matrix, Array]]:
    """Each matrix with its factor, float32[r, a or b]: a view of what lies one after the other."""
    done = 0
    for matrix in matrices:
        size = matrix.factor_size(left=left)
        yield matrix, factors[done : done + size].reshape(matrix.rank, -1)
        done += size
