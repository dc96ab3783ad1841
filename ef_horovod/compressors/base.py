"""Base of compressors: frozen dataclasses that turn a vector into a payload of fewer bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np

from ef_horovod import wire
from ef_horovod.arrays import A, Array, float_namespace, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.arrays.numpy import Like
from ef_horovod.common.repr import Shown
from ef_horovod.common.schedules import Schedule
from ef_horovod.compressors.payload import Payload as Payload
from ef_horovod.compressors.payload import mean_at_once as mean_at_once
from ef_horovod.errors import NonFiniteError, PayloadError

DEFAULT_KEY = Key()
_LONGEST = 2**40  # numbers; no vector of a model is longer


@dataclass(frozen=True)
class Compressor(Shown):
    """Base of all compressors.

    A subclass implements `body_nbytes`, `encode` and `accumulate`, states its properties
    (`allreducible`, `unbiased`, `contraction`, `variance`) and lists `examples` for the contract
    tests.
    x is a vector of d float32 numbers. Other shapes are flattened, other float types converted.

    A setting may be a schedule, as in `TopK(ratio=Exponential(0.25, 0.001, steps=2000))`. The field
    then has the final value, and so have all claims and sizes. `compress` takes the value of the
    key's step.
    """

    schedules: tuple[tuple[str, Schedule], ...] = field(default=(), init=False, repr=False)

    wire_id: ClassVar[int]
    # Whether `encode` accepts a share s as `residual` and leaves x - s C(x), as `Scaled` needs.
    weighs_residual: ClassVar[bool] = False
    # Whether a payload has some entries with their places and nothing of the others; see `clear`.
    sends_entries: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "accumulate" in cls.__dict__:
            # Inherited ones cannot read this class's bodies.
            for name in ("mean", "least_nbytes", "require_body"):
                if name not in cls.__dict__:
                    setattr(cls, name, vars(Compressor)[name])

    @cached_property
    def changes(self) -> bool:
        """Whether a setting, or one of a compressor inside, depends on the step."""
        return bool(self.schedules) or any(inner.changes for _, inner in _inner(self))

    def at(self, step: int) -> Compressor:
        """The compressor of a step, without schedules; itself if it has none.

        Example:
            >>> import ef_horovod as ef
            >>> ef.TopK(ratio=ef.Piecewise({0: 0.1, 1000: 0.01})).at(5)
            TopK(ratio=0.1)
        """
        return _at(self, step) if self.changes else self

    @property
    def extremes(self) -> tuple[Compressor, ...]:
        """The compressors with the smallest and with the largest values of all schedules."""
        if not self.changes:
            return (self,)
        least = _with_values(self, lambda schedule: schedule.bounds[0])
        return least, _with_values(self, lambda schedule: schedule.bounds[1])

    @property
    def fixed_size(self) -> bool:
        """Whether a payload's size depends on d and step only: all ranks send equal sizes."""
        return True

    @property
    def allreducible(self) -> bool:
        """Whether payloads of all ranks may be summed in flight, entry by entry."""
        return False

    @property
    def unbiased(self) -> bool:
        """Whether E C(x) = x."""
        return False

    def contraction(self, d: int) -> float | None:
        """delta in (0, 1] with E||C(x) - x||^2 <= (1 - delta) ||x||^2, or None if there is none."""
        return None

    def variance(self, d: int) -> float | None:
        """omega with E||C(x) - x||^2 <= omega ||x||^2, for unbiased compressors, else None."""
        return None

    @property
    def contracts(self) -> bool:
        """Whether it is a contraction for vectors of every length, as methods require.

        `QSGD(100, bucket=None)` is one for a thousand numbers, but not for a million.
        """
        return self.contraction(_LONGEST) is not None

    @property
    def supports_error_feedback(self) -> bool:
        """Whether the error memory stays bounded for all bounded gradients.

        True for contractions. Other bounds also suffice: an absolute bound as in `HardThreshold`,
        or a contraction in another norm as in `OneBit("l2")` and `TernGrad` with a clip.
        """
        return self.contracts

    @classmethod
    def examples(cls) -> tuple[Compressor, ...]:
        """Instances for the contract tests, the table in the docs and the benchmarks."""
        raise NotImplementedError(f"{cls.__name__} must list examples() for the contract tests")

    def body_nbytes(self, d: int) -> int:
        """Exact size of a body for d elements; the smallest size if not `fixed_size`."""
        raise NotImplementedError

    def encode(self, x: Array, key: Key, *, residual: bool) -> tuple[np.ndarray, ...]:
        """The parts of a payload's body, on the host.

        Args:
            x: float32[d], flat; becomes x - C(x) in place if `residual`, else is not changed.
            key: determines random draws.

        Raises:
            NonFiniteError: through `require_finite`; x may have any values then.
        """
        raise NotImplementedError

    @classmethod
    def least_nbytes(cls, d: int) -> int:
        """The fewest bytes of a body for d elements, over all options.

        Receivers check it before they allocate d numbers. It must not fall as d grows. 0 is always
        valid, but then a damaged length is noticed only after the allocation.
        """
        return 0

    @classmethod
    def require_body(cls, body: np.ndarray, d: int) -> None:
        """Raise unless a body can be one for d elements; allocates no d numbers.

        Raises:
            PayloadError: it cannot be one.
        """
        if body.size < cls.least_nbytes(d):
            raise PayloadError(
                f"{cls.__name__} payload has {body.size} bytes for {d} elements, expected at least "
                f"{cls.least_nbytes(d)}; it was cut off or damaged on the way"
            )

    @classmethod
    def accumulate(cls, body: np.ndarray, dense: Array, weight: float) -> None:
        """dense += weight * C(x), for dense float32[d]; checks the body before it writes."""
        raise NotImplementedError

    @classmethod
    def mean(
        cls, bodies: Sequence[np.ndarray], workers: int, plus: np.ndarray | None, out: np.ndarray
    ) -> bool:
        """out = sum of C(x_i) / workers + plus in one pass over memory, if the class supports it.

        Args:
            bodies: of the x_i, in the order of addition; may be fewer than `workers`. All are
                checked before anything is written.
            plus: float32[d], or None to add nothing.
            out: float32[d].

        Returns:
            Whether it was done; if so, bitwise as by `accumulate` on zeros.

        Raises:
            PayloadError: a body is malformed.
        """
        return False

    @classmethod
    def summands(cls, body: np.ndarray) -> np.ndarray:
        """The part of a linear compressor's body that may be summed, as a float32 view."""
        raise NotImplementedError

    @classmethod
    def clear(cls, body: np.ndarray, x: Array) -> None:
        """x = 0 at the places of a body's entries, for float32[d] x, if it `sends_entries`."""
        raise NotImplementedError

    def nbytes(self, d: int) -> int:
        """Exact size of a payload for d elements, in bytes; see `body_nbytes`."""
        return wire.HEADER_NBYTES + self.body_nbytes(d)

    def compress(self, x: A, key: Key = DEFAULT_KEY) -> Payload[A]:
        """Compress x; x is not changed, and the same x and key give the same bytes.

        Args:
            x: floating-point array of any shape, of NumPy or torch.
            key: determines the draws of random compressors; each step needs a new key.

        Raises:
            NonFiniteError: x has a NaN or an infinity.
            TypeError: x is not a floating-point array of a supported framework.

        Example:
            >>> import ef_horovod as ef, numpy
            >>> payload = ef.TopK(k=1).compress(numpy.array([1.0, -5.0, 2.0], dtype="float32"))
            >>> payload.decompress()
            array([ 0., -5.,  0.], dtype=float32)
        """
        xp = _checked(x, key)
        flat = xp.flat_float32(x)
        parts = self.at(key.step).encode(flat, key, residual=False)
        return self._payload(parts, flat.shape[0], xp.like(x))

    def compress_with_residual(self, x: A, key: Key = DEFAULT_KEY) -> tuple[Payload[A], A]:
        """Compress x and also return the compression error: (payload, x - C(x)).

        The residual may take x's memory, so do not use x afterwards. It is float32, or float64 for
        a float64 x, in x's shape.

        Raises:
            NonFiniteError: x has a NaN or an infinity; x is lost.
            TypeError: x is not a floating-point array of a supported framework.

        Example:
            >>> import ef_horovod as ef, numpy
            >>> x = numpy.array([1.0, -5.0, 2.0], dtype="float32")
            >>> ef.TopK(k=1).compress_with_residual(x)[1]
            array([1., 0., 2.], dtype=float32)
        """
        xp = _checked(x, key)
        if xp.is_float64(x):
            payload = self.compress(x, key)
            return payload, xp.detached(x) - payload.decompress()
        flat = xp.flat_float32(x, writable=True)
        parts = self.at(key.step).encode(flat, key, residual=True)
        payload = self._payload(parts, flat.shape[0], xp.like(x))
        return payload, xp.shaped(flat, xp.like(x))

    def skip(self, x: Array, key: Key = DEFAULT_KEY) -> Payload:
        """A payload of the usual size for x with the flag to drop this step on all ranks.

        If the size depends on the key and payloads may be summed, it has the size for that key.
        """
        d = int(np.prod(x.shape))
        if self.allreducible and not self.fixed_size:
            return self.skip_like_zeros(x, key)
        body = np.zeros(self.at(key.step).body_nbytes(d), np.uint8)
        return self._payload((body,), d, namespace(x).like(x)).as_skip()

    def skip_like_zeros(self, x: Array, key: Key) -> Payload:
        """`skip` with the body of a payload of zeros, for classes whose `summands` read it."""
        nothing = self.compress(np.zeros(int(np.prod(x.shape)), np.float32), key)
        return nothing.flagged(wire.SKIP, namespace(x).like(x))

    def absent(self, x: Array) -> Payload:
        """A payload without numbers, which counts as zeros in this step."""
        d = int(np.prod(x.shape))
        header = wire.Header(self.wire_id, wire.ABSENT, 0, d)
        return Payload(header.pack(), namespace(x).like(x))

    def _payload(self, parts: tuple[np.ndarray, ...], d: int, like: Like) -> Payload:
        raw = [part.view(np.uint8) for part in parts]
        nbytes = sum(part.size for part in raw)
        if d > wire.MAX_ELEMENTS or wire.HEADER_NBYTES + nbytes > wire.MAX_NBYTES:
            raise ValueError(
                f"got {d} elements, which take {wire.HEADER_NBYTES + nbytes} bytes, expected at "
                f"most {wire.MAX_ELEMENTS} elements and {wire.MAX_NBYTES} bytes in one payload; "
                "compress the parts of a larger array one by one"
            )
        header = wire.Header(self.wire_id, 0, nbytes, d)
        return Payload(np.concatenate([header.pack(), *raw]), like)


@lru_cache(maxsize=64)
def _at(compressor: Compressor, step: int) -> Compressor:
    return _with_values(compressor, lambda schedule: schedule.at(step))


def _with_values(compressor: Compressor, value: Callable[[Schedule], float]) -> Compressor:
    """The compressor with a value in place of each schedule; whole numbers are rounded."""
    changed: dict[str, Any] = {
        name: _with_values(inner, value) for name, inner in _inner(compressor) if inner.changes
    }
    for name, schedule in compressor.schedules:
        final = getattr(compressor, name)
        changed[name] = round(value(schedule)) if isinstance(final, int) else value(schedule)
    return replace(compressor, **changed)


def _inner(compressor: Compressor) -> list[tuple[str, Compressor]]:
    held = ((field.name, getattr(compressor, field.name)) for field in fields(compressor))
    return [(name, value) for name, value in held if isinstance(value, Compressor)]


def require_finite(number: Any, compressor: Compressor) -> None:
    """Raise unless `number` (a sum, a maximum, the kept values) is finite.

    Raises:
        NonFiniteError: it is not finite.
    """
    if not np.all(np.isfinite(number)):
        raise NonFiniteError(
            f"{compressor} got a vector with a NaN or an infinity, expected finite numbers; "
            "skip this step, or lower the learning rate or loss scale"
        )


def _checked(x: Array, key: Key) -> Any:
    """The array functions for x, after checks of x and key."""
    if not isinstance(key, Key):
        raise TypeError(
            f"got key={key!r}, expected an ef.Key; write for example ef.Key(seed=0, step=3)"
        )
    return float_namespace(x)
