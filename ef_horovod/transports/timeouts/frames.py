"""Where all threads of this process stand."""

from __future__ import annotations

import gc
import sys
import threading
from types import FrameType

_one_at_a_time = threading.Lock()


def current_frames() -> dict[int, FrameType]:
    """`sys._current_frames()`, without its deadlock.

    In Python 3.11 a garbage collection inside of it can give away Python's lock while it holds the
    lock of the list of threads (python/cpython#106883, seen on 3.11.7), so none may happen there.
    """
    with _one_at_a_time:
        collects = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames()
        finally:
            if collects:
                gc.enable()
