"""The rows of the demo's table, and how what they send is counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import ef_horovod as ef
from ef_horovod.training.policy import small_or_vector
from ef_horovod.transports.base import ring_share


class Sent(NamedTuple):
    """Bytes sent by this rank so far."""

    everything: int
    compressed: int  # for the parameters that ef_horovod compresses, the large ones, alone


class Row(NamedTuple):
    """A way to train: by a method, or by one of stock Horovod's compressions."""

    label: str
    method: ef.Method | None
    stock: str = ""  # its name in hvd.Compression
    adapter: bool = False  # ef.Compression in Horovod's own optimizer or tape
    updates: bool = False  # ef.CompressedUpdates


ROWS = {
    "dense": Row("Horovod, dense", None, "none"),
    "fp16": Row("Horovod, fp16", None, "fp16"),
    "updates": Row(
        "CompressedUpdates, ErrorFeedback(OneBit())", ef.ErrorFeedback(ef.OneBit()), updates=True
    ),
    "updates-signs": Row(
        "CompressedUpdates, ErrorFeedback(Then(TopK(0.02), OneBit()))",
        ef.ErrorFeedback(ef.Then(ef.TopK(ratio=0.02), ef.OneBit())),
        updates=True,
    ),
    "onebit": Row("ErrorFeedback(OneBit())", ef.ErrorFeedback(ef.OneBit())),
    "topk": Row("EF21(TopK(0.01))", ef.EF21(ef.TopK(ratio=0.01))),
    "topk-momentum": Row(
        "EF21(TopK(0.01), momentum=0.5)", ef.EF21(ef.TopK(ratio=0.01), momentum=0.5)
    ),
    "topk-ef": Row("ErrorFeedback(TopK(0.01))", ef.ErrorFeedback(ef.TopK(ratio=0.01))),
    "topk-stock": Row(
        "EF21(TopK(0.01)), ef.Compression", ef.EF21(ef.TopK(ratio=0.01)), adapter=True
    ),
    "topk-ef-stock": Row(
        "ErrorFeedback(TopK(0.01)), ef.Compression",
        ef.ErrorFeedback(ef.TopK(ratio=0.01)),
        adapter=True,
    ),
}


def sent_by(stats: list[Any]) -> Sent:
    """What an optimizer of ef_horovod has sent, from its `stats()`."""
    *buckets, total = stats
    compressed = sum(bucket.bytes_out for bucket in buckets if bucket.exchange != "dense")
    return Sent(total.bytes_out, compressed)


class CountingCompression:
    """One of Horovod's own compressions, counting what it hands to the allreduce.

    Counted is a ring's share, 2 (n - 1) / n of the tensor, as ef_horovod counts its own.

    Args:
        inner: of hvd.Compression.
        ranks: n.
        itemsize: bytes of an element of a tensor.
    """

    def __init__(self, inner: Any, ranks: int, itemsize: Callable[[Any], int]) -> None:
        self._inner, self._ranks, self._itemsize = inner, ranks, itemsize
        self.sent = Sent(0, 0)

    def compress(self, tensor: Any) -> tuple[Any, Any]:
        small, context = self._inner.compress(tensor)
        nbytes = ring_share(math.prod(small.shape) * self._itemsize(small), self._ranks)
        large = 0 if small_or_vector("", tensor) else nbytes
        self.sent = Sent(self.sent.everything + nbytes, self.sent.compressed + large)
        return small, context

    def decompress(self, tensor: Any, context: Any) -> Any:
        return self._inner.decompress(tensor, context)
