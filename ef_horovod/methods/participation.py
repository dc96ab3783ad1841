"""Which workers take part in a step: the same draw on all ranks, without communication."""

from __future__ import annotations

import numpy as np

from ef_horovod.arrays.keys import Key


def participates(share: float | None, key: Key) -> bool:
    """Whether the worker with this key sends: one of max(1, floor(share * n)), without replacement.

    The draw depends on seed and step only, so a worker takes part with all of its buckets or none.

    Args:
        share: in (0, 1], or None for all.
        key: the worker's.
    """
    if share is None:
        return True
    from ef_horovod.arrays import kernels

    count = int(share * key.workers + 1e-9)  # 0.29 * 100 is 28.999...
    chosen = np.empty(max(1, count), np.int64)
    seed = np.uint64(key._replace(tensor=0).apart(2).draw(shared=True))
    kernels.random_indices(seed, key.workers, chosen)
    return key.rank in chosen
