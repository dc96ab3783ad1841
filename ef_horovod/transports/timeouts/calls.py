"""Finds the TensorFlow calls that run now, so that one can check later if they have ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import PurePath
from types import FrameType

from ef_horovod.transports.timeouts.frames import current_frames

_EXECUTE = "tensorflow/python/eager/execute.py"  # runs a graph; returns or raises at its end
_OURS = "ef_horovod/tensorflow/"
_EAGER = ("reduce", "compress")  # an eager step runs in these, in the caller's thread


def calls_under_way() -> Callable[[], bool]:
    """A function that tells later whether any call that runs now is still running.

    Call this from inside a step: in a thread of TensorFlow's executor, while the call of the graph
    waits in another thread, or below the eager call itself. It is needed because a step that fails
    elsewhere ends its call without notice to those who wait for its collectives.
    """
    this = threading.get_ident()
    calls: list[FrameType] = []
    for thread, innermost in current_frames().items():
        for frame in _stack(innermost):
            path = PurePath(frame.f_code.co_filename).as_posix()
            eager = thread == this and _OURS in path and frame.f_code.co_name in _EAGER
            if eager or path.endswith(_EXECUTE):
                calls.append(frame)
                break
    if not calls:
        return lambda: True  # unknown

    def any_left() -> bool:
        running = {id(frame) for top in current_frames().values() for frame in _stack(top)}
        return any(id(call) in running for call in calls)

    return any_left


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
