"""The library's errors, all with one base class."""

from __future__ import annotations


class EFHorovodError(Exception):
    """Base class of ef_horovod's errors."""


class PayloadError(EFHorovodError, ValueError):
    """A payload is malformed: wrong magic, length or counts, or an index out of bounds."""


class NonFiniteError(EFHorovodError, FloatingPointError):
    """A NaN or an infinity was about to be compressed."""


class ConfigMismatchError(EFHorovodError, RuntimeError):
    """Two ranks disagree about the compression config, the parameter names or their shapes."""


class UnsupportedError(EFHorovodError, TypeError):
    """A combination that cannot work; the message says what to use instead."""


class CollectiveTimeoutError(EFHorovodError, TimeoutError):
    """A wait for other ranks timed out; the message names the rank and the collective."""


class OutOfSyncError(EFHorovodError, RuntimeError):
    """Parameters differ between ranks; the message names two ranks and the likely reasons."""


class ProtocolError(EFHorovodError, RuntimeError):
    """A message between worker and server is malformed, late, early or duplicate.

    Attributes:
        worker: the sender, if it is not the worker whose message was being read; else None.
    """

    def __init__(self, message: str, worker: int | None = None) -> None:
        super().__init__(message)
        self.worker = worker


class ServerError(EFHorovodError, RuntimeError):
    """The parameter server ended the job; the message is its reason."""


class LogError(EFHorovodError, ValueError):
    """A log that cannot be read or shown; the message says which file and why."""


class StateFileError(EFHorovodError, ValueError):
    """A file of error-feedback state cannot be read or written; the message names it."""


def without_adapter(compression: object) -> UnsupportedError:
    """The error for a method or a compressor passed directly to stock Horovod."""
    return UnsupportedError(
        f"got {compression!r} as compression= of stock Horovod, expected ef.Compression; write "
        "ef.Compression(method, model.named_parameters()), with model.trainable_variables in "
        "TensorFlow, or take ef.DistributedOptimizer"
    )
