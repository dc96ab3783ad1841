"""The rows of the demo's table: how each wraps the optimizer and counts what it sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import horovod.torch as hvd
import torch
from torch import nn

import ef_horovod.torch as ef
from ef_horovod.transports.base import ring_share


class Sent(NamedTuple):
    """Bytes sent by this rank so far."""

    everything: int
    compressed: int  # for the parameters that ef_horovod compresses, the large ones, alone


class Row(NamedTuple):
    """A way to train."""

    label: str
    method: ef.Method | None  # None: stock Horovod
    stock: Any = None  # one of hvd.Compression's


ROWS = {
    "dense": Row("Horovod, dense", None, hvd.Compression.none),
    "fp16": Row("Horovod, fp16", None, hvd.Compression.fp16),
    "onebit": Row("ErrorFeedback(OneBit())", ef.ErrorFeedback(ef.OneBit())),
    "topk": Row("EF21(TopK(0.01))", ef.EF21(ef.TopK(ratio=0.01))),
    "topk-momentum": Row(
        "EF21(TopK(0.01), momentum=0.5)", ef.EF21(ef.TopK(ratio=0.01), momentum=0.5)
    ),
    "topk-ef": Row("ErrorFeedback(TopK(0.01))", ef.ErrorFeedback(ef.TopK(ratio=0.01))),
}
DEFAULT_ROWS = ("dense", "fp16", "onebit", "topk", "topk-ef")


def distribute(
    row: Row, optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[Any, Callable[[], Sent]]:
    """The wrapped optimizer, and a function that says what it has sent."""
    if row.method is None:
        counting = CountingCompression(row.stock)
        stock = hvd.DistributedOptimizer(
            optimizer, named_parameters=model.named_parameters(), compression=counting
        )
        return stock, lambda: counting.sent
    wrapped = ef.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=row.method
    )
    return wrapped, lambda: _sent(wrapped.stats())


def _sent(stats: list[Any]) -> Sent:
    *buckets, total = stats
    compressed = sum(bucket.bytes_out for bucket in buckets if bucket.exchange != "dense")
    return Sent(total.bytes_out, compressed)


class CountingCompression:
    """One of Horovod's own compressions, counting what it hands to the allreduce.

    Counted is a ring's share, 2 (n - 1) / n of the tensor, as ef_horovod counts its own.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.sent = Sent(0, 0)

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        small, context = self._inner.compress(tensor)
        nbytes = ring_share(small.numel() * small.element_size(), hvd.size())
        large = 0 if ef.small_or_vector("", tensor) else nbytes
        self.sent = Sent(self.sent.everything + nbytes, self.sent.compressed + large)
        return small, context

    def decompress(self, tensor: torch.Tensor, context: Any) -> torch.Tensor:
        return self._inner.decompress(tensor, context)
