"""`ef.save` and `ef.load`: one file with error-feedback state for any number of ranks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ef_horovod.common.files import write_atomically
from ef_horovod.errors import StateFileError, UnsupportedError
from ef_horovod.training.driver import StepDriver
from ef_horovod.training.state_file import pack, unpack
from ef_horovod.transports.base import Transport

_PIECE_NBYTES = 2**24  # of a file, in one collective


class Saved(Protocol):
    """A wrapped optimizer, an `ef.Reducer` or an `ef.Compression`."""

    @property
    def drivers(self) -> Sequence[StepDriver[Any]]: ...

    # Also `outside`, if True: whether this rank is outside of the process set.

    def merged_state_dict(self) -> dict[str, Any]:
        """State for any number of ranks; collective."""


def save(path: str | os.PathLike[str], optimizer: Saved) -> None:
    """Save the error-feedback state of all ranks in one file that any number of ranks can load.

    Call it on all ranks after the same step; rank 0 writes (with a process set, its first rank).
    Save the model and the optimizer's own state as usual. The file holds what the state means for
    training and not each rank's part: the mean over ranks of what was not sent yet, EF21's H,
    momenta, PowerSGD's factors, the step.
    To go on with equal ranks to the last bit, save `compression_state_dict()` on each rank.

    The file gets its name when it is complete, needs no pickle, and is checked when it is read.

    Args:
        path: of the file; its folder exists on rank 0.
        optimizer: a wrapped optimizer, an `ef.Reducer` or an `ef.Compression`.

    Raises:
        StateFileError: on all ranks, if rank 0 could not write the file.
        UnsupportedError: servers keep a part of the state, or a method's state cannot be merged.

    Example:
        ef.save("compression.ef", optimizer)
    """
    if _is_outside(optimizer):
        return
    state, transport, problem = optimizer.merged_state_dict(), _transport(optimizer), ""
    if transport is None or transport.rank == 0:
        try:
            write_atomically(Path(path), lambda file: file.write(pack(state)))
        except (OSError, TypeError, ValueError) as error:  # the others wait for its text
            problem = (
                f"could not write {path} ({error}), expected a file name in a folder that "
                "exists and has room; make room, or name another path"
            )
    if problem := from_rank_0(transport, problem.encode()).decode():
        raise StateFileError(problem)


def load(path: str | os.PathLike[str], optimizer: Saved) -> None:
    """Load a file of `save`, on any number of ranks.

    Call it on all ranks, before training goes on; rank 0 reads the file. The model, the method and
    what is compressed must be the same. The exchange, buckets and number of ranks may be others.
    In an elastic job call it where you read the model's file: it is not collective there, and
    `hvd.elastic.TorchState` gives rank 0's state to all.

    Args:
        path: of the file.
        optimizer: of the kind that was saved. In TensorFlow before the first step, that step
            raises the errors about its state.

    Raises:
        StateFileError: on all ranks, if rank 0 cannot read the file: it is missing, damaged, of
            another kind or of a newer version. Then nothing has changed.
        ValueError: the state is that of another model or method. Then nothing has changed.

    Example:
        ef.load("compression.ef", optimizer)
    """
    if _is_outside(optimizer):
        return
    transport, data, problem = _transport(optimizer), b"", ""
    alone = any(driver.has_newcomers for driver in optimizer.drivers)
    others = None if alone else transport
    if others is None or others.rank == 0:
        try:
            data = Path(path).read_bytes()
            unpack(data, str(path))
        except StateFileError as error:
            problem = str(error)
        except (OSError, TypeError, ValueError) as error:
            problem = (
                f"could not read {path} ({error}), expected a file of ef.save; name "
                "the right path, or start without it"
            )
    if problem := from_rank_0(others, problem.encode()).decode():
        raise StateFileError(problem)
    state = unpack(from_rank_0(others, data), str(path))
    if transport is not None and state:
        take = getattr(optimizer, "load_compression_state_dict", None)
        (take or optimizer.load_state_dict)(state)  # type: ignore[attr-defined]
    elif state or (transport is not None and transport.rank == 0):
        here = 1 if transport is None else transport.size
        warnings.warn(
            f"got {path} of a job of {state.get('size', 1)} ranks for one of {here}, "
            "expected several in both, because a single rank keeps no error-feedback state; what "
            "was not sent yet is left out, and state starts from zero",
            stacklevel=2,
        )


def _is_outside(optimizer: Any) -> bool:
    """Whether this rank has no part in the optimizer's process set.

    Raises:
        UnsupportedError: this is something else than an optimizer with such state.
    """
    if not all(hasattr(optimizer, name) for name in ("drivers", "merged_state_dict")):
        raise UnsupportedError(
            f"got a {type(optimizer).__name__}, expected a wrapped optimizer, an ef.Reducer or an "
            "ef.Compression; pass the result of ef.DistributedOptimizer"
        )
    return bool(getattr(optimizer, "outside", False))


def _transport(optimizer: Saved) -> Transport | None:
    """To the other ranks; None with a single rank."""
    return next((driver.transport for driver in optimizer.drivers), None)


def from_rank_0(transport: Transport | None, data: bytes) -> bytes:
    """The bytes of rank 0 on all ranks; collective."""
    if transport is None:
        return data
    length = np.array([len(data)], "<u8").view(np.uint8)
    total = int(transport.allgather("file.length", length)()[0].view("<u8")[0])
    step = max(1, min(_PIECE_NBYTES, 2**30 // transport.size))
    return b"".join(
        _piece(transport, data[at : at + step], min(step, total - at))
        for at in range(0, total, step)
    )


def _piece(transport: Transport, data: bytes, size: int) -> bytes:
    """A part of the bytes of rank 0, of known size; others send one byte, which is ignored."""
    sent = data if transport.rank == 0 else b"-"
    lengths = iter([size] + [1] * (transport.size - 1))
    own = np.frombuffer(sent, np.uint8).copy()
    return transport.allgather("file.piece", own, lambda _: next(lengths))()[0].tobytes()
