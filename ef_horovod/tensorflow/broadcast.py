"""One rank's values for all of them. Stock Horovod goes by names; here places count."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from ef_horovod.exchange.config_check import require_same_config
from ef_horovod.tensorflow.sync import require_horovod
from ef_horovod.tensorflow.variables import native, own_name, require_variables
from ef_horovod.training.in_sync import digest_of
from ef_horovod.transports.horovod_tensorflow import HorovodTensorFlowTransport


def broadcast_variables(
    variables: Iterable[Any], root_rank: int = 0, timeout: float | None = None
) -> None:
    """Give all ranks the values of one rank; for tf.Variables and Keras variables of any kind.

    Ranks first compare what they have: names (without Keras' counters, which depend on what else a
    rank has built), shapes, dtypes and number. Only values that differ are sent. Where they do, the
    error-feedback state of what trains these variables starts anew on all ranks, for it holds
    gradients at values that no longer exist.

    Args:
        variables: model.variables, optimizer.variables; in the same order on all ranks.
        root_rank: whose values are taken.
        timeout: seconds to wait for other ranks; default $EF_HOROVOD_TIMEOUT or 300.

    Raises:
        ConfigMismatchError: ranks have other variables; names two ranks and what differs.
        UnsupportedError: Horovod is not initialised, as in a job with parameter servers; or a model
            in place of its variables.
        ValueError: there is no such rank.

    Example:
        ef.broadcast_variables(model.variables + optimizer.variables)
    """
    require_horovod("ef.broadcast_variables")
    listed = require_variables(variables)
    transport = HorovodTensorFlowTransport("ef.broadcast", timeout=timeout)
    if not 0 <= root_rank < transport.size:
        raise ValueError(
            f"got root_rank={root_rank}, expected a rank from 0 to {transport.size - 1}"
        )
    if transport.size == 1:
        return
    with tf.init_scope():
        natives = [native(v) for v in listed]
        values = [np.asarray(v.read_value()) for v in natives]
        facts = [
            f"variable number {i} '{own_name(variable)}' of shape {value.shape} and {value.dtype}"
            for i, (variable, value) in enumerate(zip(listed, values, strict=True))
        ]
        require_same_config(transport, [f"root_rank={root_rank}", *facts])
        if not values:
            return
        differ = _places_that_differ(transport, values)
        for k, places in enumerate(_packed([values[i].nbytes for i in differ], _PACK_NBYTES)):
            chosen = [differ[place] for place in places]
            mine = np.concatenate([_bytes_of(values[i]) for i in chosen])
            roots, start = transport.broadcast(f"values.{k}", mine, root_rank), 0
            for i in chosen:
                stop = start + values[i].nbytes
                natives[i].assign(roots[start:stop].view(values[i].dtype).reshape(values[i].shape))
                start = stop
        changed = {id(natives[i]) for i in differ}
        for follower in list(_followers):
            if not changed.isdisjoint(id(native(v)) for v in follower.followed):
                follower.forget()


def _places_that_differ(
    transport: HorovodTensorFlowTransport, values: Sequence[np.ndarray]
) -> list[int]:
    """Places of the values that are not the same bits on all ranks; the same list on all ranks."""
    mine = np.concatenate([digest_of([value]) for value in values])
    everyones = np.stack(transport.allgather("digests", mine)()).reshape(transport.size, -1, 32)
    return [int(i) for i in np.flatnonzero((everyones != everyones[0]).any(axis=(0, 2)))]


def _packed(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Places in groups of at most `limit` bytes, larger ones alone."""
    groups: list[list[int]] = []
    room = 0
    for place, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(place)
        room -= size
    return groups


class Follower(Protocol):
    """What has error-feedback state of variables."""

    @property
    def followed(self) -> list[Any]:
        """Whose gradients it averages."""

    def forget(self) -> None:
        """Start anew, with states as before the first step."""


def follow(follower: Follower) -> None:
    """Have it told when `broadcast_variables` changes its variables; it may die all the same."""
    _followers.add(follower)


_followers: weakref.WeakSet[Follower] = weakref.WeakSet()
_PACK_NBYTES = 64 * 2**20  # of a broadcast, if it has several variables


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """uint8[m]: its bits."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
