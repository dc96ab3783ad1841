"""The current stack frames of all threads."""

from __future__ import annotations

import gc
import sys
import threading
from types import FrameType

_one_at_a_time = threading.Lock()


def current_frames() -> dict[int, FrameType]:
    """`sys._current_frames()`, without its deadlock.

    In Python 3.11 a garbage collection inside it can release the GIL while it holds the lock of
    the thread list (python/cpython#106883, seen on 3.11.7). So the collector is off during it.
    """
    with _one_at_a_time:
        collects = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames()
        finally:
            if collects:
                gc.enable()
