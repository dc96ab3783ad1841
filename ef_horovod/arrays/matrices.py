"""Matrices inside a flat vector, and their low-rank factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ef_horovod.arrays import Array


class Matrix(NamedTuple):
    """A matrix a x b in C order inside a vector, and the rank r of its factors.

    M is approximated by P Q^T. P (a x r) is the left factor and Q (b x r) the right one. They are
    stored transposed, as float32[r, a] and float32[r, b].
    """

    start: int  # of its a * b entries in the vector
    rows: int  # a
    columns: int  # b
    rank: int  # r, at most a and b

    @property
    def stop(self) -> int:
        """End of its entries in the vector."""
        return self.start + self.rows * self.columns

    def side(self, *, left: bool) -> int:
        """a or b: the row length of the stored factor."""
        return self.rows if left else self.columns

    def factor_size(self, *, left: bool) -> int:
        """Number of entries of a factor."""
        return self.rank * self.side(left=left)


def factors_size(matrices: Sequence[Matrix], *, left: bool) -> int:
    """Number of entries of the factors of all matrices."""
    return sum(matrix.factor_size(left=left) for matrix in matrices)


def each_factor(
    matrices: Sequence[Matrix], factors: Array, *, left: bool
) -> Iterator[tuple[Matrix, Array]]:
    """Each matrix with its factor, float32[r, a or b]: a view of the concatenated `factors`."""
    done = 0
    for matrix in matrices:
        size = matrix.factor_size(left=left)
        yield matrix, factors[done : done + size].reshape(matrix.rank, -1)
        done += size
