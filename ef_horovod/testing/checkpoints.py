"""Checks that a method's error-feedback state survives a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ef_horovod.errors import UnsupportedError
from ef_horovod.exchange.channel import Channel
from ef_horovod.methods.base import Method
from ef_horovod.methods.merging import Merge
from ef_horovod.testing.frameworks import OneChannel
from ef_horovod.testing.tools import require
from ef_horovod.testing.workers import D, channels, gradients, run_channels
from ef_horovod.training.buckets import Slot
from ef_horovod.training.merging import Parameters, merge, split
from ef_horovod.training.state import read_state, write_state

_RANKS, _SAVED_AT, _STEPS = 3, 5, 14
# A bucket of two parameters: the saved state is split by parameter and joined again.
_SLOTS = [Slot("a", None, 0, 200), Slot("b", None, 200, D)]


def check_checkpoint(method: Method, exchange: str = "auto") -> None:
    """A run from a checkpoint continues like the uninterrupted one.

    The state dict is loaded into channels that have taken other steps.
    """
    whole, resumed = (channels(method, _RANKS, exchange=exchange) for _ in range(2))
    g = gradients(_RANKS, _STEPS)
    for t in range(_SAVED_AT):
        run_channels(whole, g[t], t)
        run_channels(resumed, list(g[t, ::-1]), t)
    for source, target in zip(whole, resumed, strict=True):
        saved = read_state([OneChannel(source, _SLOTS)])
        for parameter in saved.values():
            _require_kinds(method, parameter)
        write_state([OneChannel(target, _SLOTS)], saved)
    for t in range(_SAVED_AT, _STEPS):
        pairs = zip(run_channels(whole, g[t], t), run_channels(resumed, g[t], t), strict=True)
        same = all(a is not None and b is not None and a.tobytes() == b.tobytes() for a, b in pairs)
        message = (
            f"goes on in another way from a checkpoint by {exchange} (step {t}); what is "
            "remembered must be in a field of the state, and not in `scratch`"
        )
        require(same, method, message)


def check_merging(method: Method) -> None:
    """State for any number of ranks: nothing is lost from 4 ranks to 3 to 6.

    The 3 ranks have another exchange, where the method allows it.
    """
    try:
        method.require_mergeable()
    except UnsupportedError:
        return  # it says so itself
    group, slots = channels(method, 4), _SLOTS if method.sliceable else [Slot("a", None, 0, D)]
    for t, g in enumerate(gradients(4, _SAVED_AT)):
        run_channels(group, g, t)
    try:
        merged = merged_state(group, slots)
    except UnsupportedError as error:
        raise AssertionError(f"{method!r} cannot merge its state: {error}") from error
    _require_means(method, group, slots, merged)
    for ranks, exchange in ((3, "double_pass" if method.sliceable else "auto"), (6, "auto")):
        group = _holding(merged, method, ranks, slots, exchange)
        message = f"loses something of its state on {ranks} ranks; see `merging`"
        require(_are_close(merged_state(group, slots), merged), method, message)
    # Where the number of ranks with equal gradients does not matter at the start, nor later.
    fresh, later = (
        [_step_of(_holding(state, method, ranks, slots)) for ranks in (3, 6)]
        for state in (None, merged)
    )
    message = "takes another direction on 6 ranks than on 3 from a merged state; see `merging`"
    require(not _alike(*fresh) or _alike(*later), method, message)


def _holding(
    merged: Parameters | None, method: Method, ranks: int, slots: list[Slot], exchange: str = "auto"
) -> list[Channel]:
    """Channels with a merged state."""
    group = channels(method, ranks, exchange=exchange)
    for channel in group if merged else ():
        split([OneChannel(channel, slots)], merged or {})
    return group


def _step_of(group: Sequence[Channel]) -> np.ndarray:
    """The direction that all ranks take with the same gradient."""
    directions = run_channels(group, [gradients(1, 1)[0, 0]] * len(group), _SAVED_AT)
    assert directions[0] is not None
    return directions[0]


def merged_state(group: Sequence[Channel], slots: list[Slot]) -> Parameters:
    """The merged state of channels in this process; one thread for each."""

    def of_rank(channel: Channel) -> Parameters:
        return merge([OneChannel(channel, slots)], channel._transport)

    with ThreadPoolExecutor(len(group)) as pool:
        return next(iter(list(pool.map(of_rank, group))))


def _require_means(
    method: Method, group: Sequence[Channel], slots: list[Slot], merged: Parameters
) -> None:
    """What a worker keeps for itself is merged to the mean over workers."""
    saved = [read_state([OneChannel(channel, slots)]) for channel in group]
    for name, fields in merged.items():
        for key, value in fields.items():
            if (method.merging or {})[key] is Merge.MEAN:
                mean = np.mean([np.float64(rank[name][key]) for rank in saved], axis=0)
                same = np.allclose(value, mean, rtol=1e-6, atol=1e-30)
                require(same, method, f"merges {key} to something else than the mean")


def _alike(first: np.ndarray, second: np.ndarray) -> bool:
    return np.allclose(first, second, rtol=1e-4, atol=1e-4)


def _are_close(first: Parameters, second: Parameters) -> bool:
    """Equal to a rounding of float32 or two."""
    return all(
        np.allclose(value, second[name][key], rtol=1e-6, atol=1e-6 * np.abs(value).max())
        for name, fields in first.items()
        for key, value in fields.items()
    )


def _require_kinds(method: Method, parameter: dict[str, object]) -> None:
    for field, value in parameter.items():
        good = hasattr(value, "shape") or isinstance(value, bool | int | float)
        message = (
            f"remembers a {type(value).__name__} in {field}, which no checkpoint holds; expected "
            "vectors, tuples of vectors and numbers, or list the field in `scratch`"
        )
        require(good, method, message)
