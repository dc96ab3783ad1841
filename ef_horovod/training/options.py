"""Checks of the options that adapters share, before anything is built or sent.

check_options("Reducer", seed=seed, bucket_bytes=bucket_bytes)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ef_horovod.common.options import flag, number, seed_of, whole
from ef_horovod.errors import UnsupportedError


def check_options(owner: str, **given: Any) -> None:
    """Raise unless each known option has a valid value.

    Args:
        owner: the class or function with these options.
        given: values by name, such as `locals()`; unknown names are ignored.

    Raises:
        ValueError: a number of the wrong type or out of range.
        UnsupportedError: another object of the wrong kind, such as a function or a process set.
    """
    for name, value in given.items():
        check = _CHECKS.get(name)
        if check is not None:
            check(owner, name, value)


def _count(owner: str, name: str, value: Any) -> None:
    whole(owner, name, value, 1, None, "1 exchanges gradients in every step")


def _steps(owner: str, name: str, value: Any) -> None:
    whole(owner, name, value, 0, None, "0 compresses from the first step on")


def _local(owner: str, name: str, value: Any) -> None:
    whole(owner, name, value, 1, None, "1 exchanges updates in every step")


def _bytes(owner: str, name: str, value: Any) -> None:
    whole(owner, name, value, 1, None, "25 * 2**20 is the default")


def _seed(owner: str, name: str, value: Any) -> None:
    seed_of(owner, value)


def _seconds(owner: str, name: str, value: Any) -> None:
    if value is not None:
        way_out = "leave it out for $EF_HOROVOD_TIMEOUT or 300"
        number(owner, name, value, "(0, inf]", way_out, "a number of seconds")


def _kind(expected: str, way_out: str, fits: Callable[[Any], bool]) -> Callable[..., None]:
    """A check of an option that is not a number."""

    def check(owner: str, name: str, value: Any) -> None:
        if not fits(value):
            raise UnsupportedError(f"{owner} got {name}={value!r}, expected {expected}; {way_out}")

    return check


def _takes_two(value: Any) -> bool:
    """Whether it can be called with two arguments, as far as Python knows."""
    if not callable(value):
        return False
    try:
        inspect.signature(value).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # some built-in functions have no signature
        pass
    return True


_CHECKS: dict[str, Callable[[str, str, Any], Any]] = {
    "backward_passes_per_step": _count,
    "bucket_bytes": _bytes,
    "dense_steps": _steps,
    "local_steps": _local,
    "seed": _seed,
    "timeout": _seconds,
    "overlap": flag,
    "sparse_as_dense": flag,
    "discardable": flag,
    "check_sync": flag,
    "average_aggregated_gradients": flag,
    "dense": _kind(
        "a function of name and parameter that says which ones stay uncompressed",
        "write dense=lambda name, parameter: False to compress all, or leave it out",
        _takes_two,
    ),
    "exchange": _kind(
        "a text", "write exchange='auto', or leave it out", lambda value: isinstance(value, str)
    ),
    "process_set": _kind(
        "one of Horovod that was added",
        "write process_set=hvd.add_process_set([0, 1]), or leave it out for all ranks",
        lambda value: value is None or getattr(value, "process_set_id", None) is not None,
    ),
    "grad_scaler": _kind(
        "a torch.amp.GradScaler",
        "write grad_scaler=scaler, or leave it out",
        lambda value: (
            value is None or (hasattr(value, "is_enabled") and not isinstance(value, type))
        ),
    ),
    "transport": _kind(
        "a Transport",
        "leave it out to get a new one",
        lambda value: value is None or hasattr(value, "allgather"),
    ),
}
