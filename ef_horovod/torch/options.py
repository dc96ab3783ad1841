"""How PyTorch gradients are averaged."""

from __future__ import annotations

from dataclasses import dataclass

from ef_horovod.methods.base import Method
from ef_horovod.policy import DensePolicy


@dataclass(frozen=True)
class Options:
    """How gradients are reduced; equal on all ranks.

    Args:
        method: for the compressed buckets.
        dense: policy that says which parameters stay uncompressed; they share one allreduce.
        exchange: "auto", "auto:NETWORK", "gather", "reduce" or "double_pass".
        bucket_bytes: size of a compressed bucket in bytes of float32.
        passes: backward passes that are accumulated before an exchange.
        seed: of random compressors.
        average: deliver means over ranks, or sums.
        sparse_as_dense: whether sparse gradients are densified; they travel as rows otherwise.
        overlap: start exchanges during backward, or all of them in `finish`; the first step's are
            never started before `finish`, where the config is checked.
        check_sync: whether ranks' parameters are compared; see `SyncCheck`.
    """

    method: Method
    dense: DensePolicy
    exchange: str
    bucket_bytes: int
    passes: int
    seed: int
    average: bool
    sparse_as_dense: bool
    overlap: bool
    check_sync: bool
