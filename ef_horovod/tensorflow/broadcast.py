"""Broadcast of one rank's values. Stock Horovod matches variables by name; this one by place."""

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
    """Give all ranks the values of one rank, for tf.Variables and all Keras variables.

    Ranks first compare the number of variables, shapes, dtypes and names. Names are compared
    without Keras' counters, which depend on the rank's other layers. Only values that differ are
    sent. If a value differs, the error-feedback state of its optimizer, tape or reducer is reset on
    all ranks, because that state holds gradients at the old values.

    Args:
        variables: model.variables, optimizer.variables; in the same order on all ranks.
        root_rank: the rank whose values are taken.
        timeout: seconds to wait for other ranks; default $EF_HOROVOD_TIMEOUT or 300.

    Raises:
        ConfigMismatchError: ranks have different variables; the message names two ranks and the
            difference.
        UnsupportedError: Horovod is not initialised, as in a job with parameter servers; or the
            argument is a model, not its variables.
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
    """Places of the values that differ bitwise between ranks; the same list on all ranks."""
    mine = np.concatenate([digest_of([value]) for value in values])
    everyones = np.stack(transport.allgather("digests", mine)()).reshape(transport.size, -1, 32)
    return [int(i) for i in np.flatnonzero((everyones != everyones[0]).any(axis=(0, 2)))]


def _packed(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Places in groups of at most `limit` bytes; a larger one is alone."""
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
    """An object with error-feedback state of variables."""

    @property
    def followed(self) -> list[Any]:
        """The variables whose gradients it averages."""

    def forget(self) -> None:
        """Reset the error-feedback state to that before the first step."""


def follow(follower: Follower) -> None:
    """Notify it when `broadcast_variables` changes its variables; holds a weak reference."""
    _followers.add(follower)


_followers: weakref.WeakSet[Follower] = weakref.WeakSet()
_PACK_NBYTES = 64 * 2**20  # limit of a broadcast of several variables


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """uint8[m]: the array's bytes."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
