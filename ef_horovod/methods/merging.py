"""What becomes of a method's state when the number of workers changes.

A method says so for each field that it keeps between steps (`Method.merging`). Merged state does
not depend on the number of workers, nor on the exchange:

    merged    from all workers: the mean of a field over them
    split     to each worker of the new job: the merged field

Error feedback depends on the mean of the workers' errors alone: with a constant learning rate, the
virtual iterate x - lr mean_i e_i takes plain SGD steps. So nothing is lost.
"""

from __future__ import annotations

from enum import Enum


class Merge(Enum):
    """How a field of a state is merged and split."""

    MEAN = "mean"  # a worker's own: each new worker gets the mean
    SHARED = "shared"  # the same wherever it is kept
    SUM = "sum"  # the aggregator's sum over workers: it grows with their number
    EACH = "each"  # the aggregator's vectors of each worker: each one becomes their mean
