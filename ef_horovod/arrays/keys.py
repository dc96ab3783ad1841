"""Counter-based random numbers: each draw depends on four integers only.

There is no generator state, and no framework's global generator is used. So every rank can repeat
another rank's draws, runs are reproducible bit for bit, and dropout is not affected.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

_MASK64 = (1 << 64) - 1


class Key(NamedTuple):
    """The integers that a draw depends on.

    Example:
        >>> Key(seed=7, step=3).draw(shared=True) == Key(seed=7, step=3, rank=5).draw(shared=True)
        True
        >>> Key(seed=7, step=3).draw(shared=False) == Key(seed=7, step=3, rank=5).draw(shared=False)
        False
    """

    seed: int = 0
    step: int = 0
    tensor: int = 0  # tensor_id(name): the same on all ranks
    rank: int = 0
    workers: int = 1  # number of ranks; draws do not depend on it

    def draw(self, *, shared: bool) -> int:
        """64 random bits: equal on all ranks if `shared`, otherwise different on each rank."""
        state = 0
        for word in (self.seed, self.step, self.tensor, 0 if shared else self.rank + 1):
            state = _mix((state + word + 0x9E3779B97F4A7C15) & _MASK64)
        return state

    def of_server(self) -> Key:
        """The aggregator's key: equal on all ranks that aggregate, different from all workers'."""
        return self.apart(1)._replace(rank=-1)

    def apart(self, purpose: int) -> Key:
        """A key whose draws are independent of this one's; compressors use purpose 0."""
        return self._replace(tensor=self.tensor + (purpose << 32))  # tensor ids have 32 bits


def tensor_id(name: str) -> int:
    """A stable integer for the name of a parameter or bucket, equal in every process and run."""
    return zlib.crc32(name.encode())


def _mix(z: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
