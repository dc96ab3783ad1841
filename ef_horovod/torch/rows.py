"""Sparse gradients in PyTorch: agree on the parameters that have them; one bucket for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.rows import Rows, RowsChannel, matrix_of
from ef_horovod.torch.buckets import Bucket, Taken, open_buckets
from ef_horovod.torch.options import Options
from ef_horovod.training.buckets import Slot, one_slot
from ef_horovod.transports.base import Transport

_MISSING, _DENSE = 0, 1  # kinds of gradient; _DENSE + s: sparse in the first s dimensions


class RowsBucket(Bucket):
    """A parameter whose sparse gradients are sent as rows.

    Args:
        name: of the parameter.
        parameter: its gradients are sparse in the first `sparse_dims` dimensions.
        sparse_dims: 1 for embeddings.
        transport: to the other ranks.
    """

    channel: RowsChannel

    def __init__(
        self, name: str, parameter: torch.Tensor, sparse_dims: int, transport: Transport
    ) -> None:
        shape = tuple(parameter.shape)
        self.sparse_dims = sparse_dims
        self._lead, self._row = shape[:sparse_dims], shape[sparse_dims:]
        channel = RowsChannel(name, *matrix_of(shape, sparse_dims), transport)
        super().__init__(channel, one_slot(name, parameter))

    def fill(self, slot: Slot, loss_scale: float, *, in_place: bool = True) -> None:
        """Take a parameter's rows (none if it has no gradient), unscaled.

        Raises:
            UnsupportedError: the gradient is not sparse, or sparse in other dimensions.
        """
        gradient = slot.parameter.grad
        kind = kind_of(gradient)
        if kind not in (_MISSING, _DENSE + self.sparse_dims):
            raise changed(slot.name, _words(_DENSE + self.sparse_dims), kind)
        self.filled[slot.parameter] = Taken.of(gradient)
        if gradient is None or kind == _MISSING:
            gradient = torch.zeros_like(slot.parameter, layout=torch.sparse_coo)
        indices = gradient._indices()[: self.sparse_dims].cpu().numpy()  # [sparse_dims, k]
        values = gradient._values().detach().float().cpu()  # [k, *row]
        if loss_scale != 1.0:
            values = values / loss_scale
        places = np.ravel_multi_index(tuple(indices), self._lead).astype(np.int64)
        self.channel.rows = Rows(places, values.reshape(len(places), self.channel.width).numpy())

    def deliver(self, direction: Any, factor: float) -> None:  # Rows or None
        """Set the sparse gradient to rows * factor; one row of NaNs if direction is None."""
        (slot,) = self.slots
        if direction is None:
            nan = np.full((1, self.channel.width), np.nan, np.float32)
            direction = Rows(np.zeros(1, np.int64), nan)
        indices = np.stack(np.unravel_index(direction.indices, self._lead))
        values = torch.from_numpy(direction.values).view(-1, *self._row)
        slot.parameter.grad = torch.sparse_coo_tensor(
            torch.from_numpy(indices),
            (values * factor if factor != 1.0 else values).to(slot.parameter.dtype),
            tuple(slot.parameter.shape),
            device=slot.parameter.device,
            is_coalesced=True,
            check_invariants=False,  # the channel has checked the indices
        )


def make_buckets(
    trainable: Sequence[tuple[str, torch.Tensor]],
    rows: dict[str, int],
    options: Options,
    transport: Transport,
) -> list[Bucket]:
    """All buckets; each parameter sent as rows has a bucket.

    Args:
        trainable: parameters with their names.
        rows: names of those sent as rows, with their number of sparse dimensions.
        options: of the engine.
        transport: to the other ranks.
    """
    named = dict(trainable)
    dense = open_buckets(
        [(name, parameter) for name, parameter in trainable if name not in rows],
        options.method,
        transport,
        dense=options.dense,
        exchange=options.exchange,
        bucket_bytes=options.bucket_bytes,
        seed=options.seed,
        dense_steps=options.dense_steps,
    )
    return dense + [RowsBucket(name, named[name], dims, transport) for name, dims in rows.items()]


def agree(
    named: Sequence[tuple[str, torch.Tensor]], known: dict[str, int], transport: Transport
) -> tuple[dict[str, int], bool]:
    """Which parameters have sparse gradients on any rank; collective.

    Args:
        named: all parameters with their names, in an order that is equal on all ranks.
        known: known results, from a checkpoint; equal on all ranks.
        transport: to the other ranks.

    Returns:
        Their names with the number of sparse dimensions, and whether any rank had a gradient.

    Raises:
        UnsupportedError: on all ranks, if a parameter's gradient is sparse on one rank and dense
            on another.
    """
    mine = np.array([kind_of(parameter.grad) for _, parameter in named], np.uint8)
    everyones = np.stack(transport.allgather("kinds", mine)())  # [ranks, parameters]
    found = dict(known)
    for (name, _), kinds in zip(named, everyones.T, strict=True):
        present = sorted({int(kind) for kind in kinds} - {_MISSING})
        expected = _DENSE + known[name] if name in known else min(present, default=_DENSE)
        if set(present) - {expected}:
            raise changed(name, _words(expected), present[-1])
        if expected != _DENSE:
            found[name] = expected - _DENSE
    return found, bool(everyones.any())


def kind_of(gradient: torch.Tensor | None) -> int:
    """Kind of a gradient: _MISSING, _DENSE, or _DENSE + number of sparse dimensions."""
    if gradient is None or (gradient.is_sparse and gradient._nnz() == 0):
        return _MISSING
    return _DENSE + (gradient.sparse_dim() if gradient.is_sparse else 0)


def no_rows(name: str, gradient: torch.Tensor, transport: Transport) -> UnsupportedError:
    """Error for a sparse gradient of a parameter that is not sent as rows."""
    if not transport.has_server:
        return changed(name, "dense", kind_of(gradient))
    return UnsupportedError(
        f"the gradient of '{name}' is sparse with exchange='server', expected a dense one, "
        "because servers know no rows; pass sparse_as_dense=True"
    )


def changed(name: str, expected: str, kind: int) -> UnsupportedError:
    """Error for a gradient whose kind differs between ranks or steps."""
    return UnsupportedError(
        f"the gradient of '{name}' is {_words(kind)}, expected it {expected} as in the first "
        "step and on all ranks; build the embedding with sparse=False, or pass "
        "sparse_as_dense=True"
    )


def _words(kind: int) -> str:
    return "dense" if kind == _DENSE else f"sparse in {kind - _DENSE} dimension(s)"
