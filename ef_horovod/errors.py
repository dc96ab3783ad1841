"""Every error of the library, so that callers can catch one base class."""

from __future__ import annotations


class EFHorovodError(Exception):
    """Base class of the errors that ef_horovod raises on purpose."""


class PayloadError(EFHorovodError, ValueError):
    """A payload is malformed: wrong magic, length, counts or an index out of bounds."""


class NonFiniteError(EFHorovodError, FloatingPointError):
    """A NaN or an infinity was about to be compressed."""


class ConfigMismatchError(EFHorovodError, RuntimeError):
    """Two ranks disagree about the compression config, the parameter names or their shapes."""


class UnsupportedError(EFHorovodError, TypeError):
    """A combination that cannot work; the message names the way out."""


class CollectiveTimeoutError(EFHorovodError, TimeoutError):
    """A wait for other ranks went past its limit; the message names the rank and the collective."""


class OutOfSyncError(EFHorovodError, RuntimeError):
    """Parameters differ between ranks; the message names two ranks and the likely reasons."""


class ProtocolError(EFHorovodError, RuntimeError):
    """A message between worker and server that is malformed, late, early or there twice.

    Attributes:
        worker: who sent it, where the one that was being looked at is innocent; else None.
    """

    def __init__(self, message: str, worker: int | None = None) -> None:
        super().__init__(message)
        self.worker = worker


class ServerError(EFHorovodError, RuntimeError):
    """The parameter server ended the job; the message is its reason."""


class ClusterError(EFHorovodError, RuntimeError):
    """A virtual cluster cannot be made here; the message says what is missing."""


def without_adapter(compression: object) -> UnsupportedError:
    """What to raise where stock Horovod was given a method or a compressor as it is."""
    return UnsupportedError(
        f"got {compression!r} as compression= of stock Horovod, expected ef.Compression; write "
        "ef.Compression(method, model.named_parameters()), with model.trainable_variables in "
        "TensorFlow, or take ef.DistributedOptimizer"
    )
