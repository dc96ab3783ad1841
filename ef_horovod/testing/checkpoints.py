"""Checks that a method's error-feedback state survives a checkpoint."""

from __future__ import annotations

from ef_horovod.methods.base import Method
from ef_horovod.testing.frameworks import OneChannel
from ef_horovod.testing.tools import require
from ef_horovod.testing.workers import D, channels, gradients, run_channels
from ef_horovod.training.buckets import Slot
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


def _require_kinds(method: Method, parameter: dict[str, object]) -> None:
    for field, value in parameter.items():
        good = hasattr(value, "shape") or isinstance(value, bool | int | float)
        message = (
            f"remembers a {type(value).__name__} in {field}, which no checkpoint holds; expected "
            "vectors, tuples of vectors and numbers, or list the field in `scratch`"
        )
        require(good, method, message)
