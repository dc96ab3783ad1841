"""Watchdog: ends the process if a Horovod call holds the GIL longer than the timeout.

`waiting` and `alarm` need the GIL to check the clock. Horovod 0.28.1 can deadlock on it: when its
thread ends, it frees tensors while it holds the lock of its process sets, and PyTorch needs the GIL
for that. The caller of the next collective holds the GIL and waits for the lock. So the watchdog is
a compiled loop in a separate thread that needs neither.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

_NAP_MICROSECONDS = 20_000
_LONGEST_SECONDS = 1e9  # 30 years, for a limit of infinity
_STDERR = 2
_CALLS = 64  # watched at the same time; one more call waits until a row is free

# Read by the loop, one row per running call: its number or 0, its limit in naps, length of its
# text in bytes.
_calls = np.zeros((_CALLS, 3), np.int64)
_texts = np.zeros((_CALLS, 4096), np.uint8)
_free: queue.SimpleQueue[int] = queue.SimpleQueue()  # rows
for _row in range(_CALLS):
    _free.put(_row)
_numbers = itertools.count(1)
_starting = threading.Lock()


@contextmanager
def ended_after(seconds: float, message: str) -> Iterator[None]:
    """End the process with status 1 if the block takes longer.

    Calls of several threads are watched independently. The limit is counted in naps, so time in
    which the process is frozen does not count.

    Args:
        seconds: the limit.
        message: one sentence to write to standard error.

    Examples:
        >>> with ended_after(60, "rank 0 did not come back in 60 s"):
        ...     sum(range(10))
        45
    """
    with _starting:
        _start()
    row = _free.get()
    words = np.frombuffer(f"ef_horovod: {message}\n".encode()[: _texts.shape[1]], np.uint8)
    _texts[row, : words.size] = words
    _calls[row, 1] = math.ceil(min(seconds, _LONGEST_SECONDS) * 1e6 / _NAP_MICROSECONDS)
    _calls[row, 2] = words.size
    _calls[row, 0] = next(_numbers)
    try:
        yield
    finally:
        _calls[row, 0] = 0
        _free.put(row)


@functools.cache
def _start() -> None:
    """Compile the loop and start it, once per process: 0.6 s with Numba's import."""
    from numba import njit  # at the first use: see `arrays/kernels.py`

    libc = ctypes.CDLL(None)
    sleep, write, leave = libc.usleep, libc.write, libc._exit
    sleep.argtypes, sleep.restype = [ctypes.c_uint], ctypes.c_int
    write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    write.restype = ctypes.c_ssize_t
    leave.argtypes, leave.restype = [ctypes.c_int], None

    @njit("void(int64[:, ::1], uint8[:, ::1])", nogil=True)
    def watch(calls, texts):  # type: ignore[no-untyped-def]
        seen, naps = np.zeros(_CALLS, np.int64), np.zeros(_CALLS, np.int64)
        while True:
            sleep(_NAP_MICROSECONDS)
            for row in range(_CALLS):
                if calls[row, 0] == 0 or calls[row, 0] != seen[row]:
                    seen[row], naps[row] = calls[row, 0], 0
                    continue
                naps[row] += 1
                if naps[row] >= calls[row, 1]:
                    write(_STDERR, texts[row].ctypes.data, calls[row, 2])
                    leave(1)

    threading.Thread(
        target=watch, args=(_calls, _texts), name="ef_horovod watchdog", daemon=True
    ).start()
