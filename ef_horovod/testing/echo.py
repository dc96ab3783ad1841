"""Transport of ranks that all send the same data: adapters and channels without a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ef_horovod.arrays import Array
from ef_horovod.transports.base import Measure, Transport


class EchoTransport(Transport):
    """Rank 0 of `size` ranks that all send the same data.

    Args:
        size: number of ranks.

    Example:
        >>> import numpy as np
        >>> EchoTransport(2).allgather("a", np.zeros(3, np.uint8))()
        [array([0, 0, 0], dtype=uint8), array([0, 0, 0], dtype=uint8)]
    """

    def __init__(self, size: int) -> None:
        super().__init__(0, size)

    def allgather(
        self, name: str, data: np.ndarray, measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        self._count_allgather([data.size] * self.size)
        return lambda: [data] * self.size

    def alltoall(
        self, name: str, parts: Sequence[np.ndarray], measure: Measure | None = None
    ) -> Callable[[], list[np.ndarray]]:
        received = [parts[0]] * self.size
        self._count_alltoall(parts, received)
        return lambda: received

    def allreduce(self, name: str, values: Array) -> Callable[[], Array]:
        values *= self.size
        self._count_allreduce(values.nbytes)
        return lambda: values
