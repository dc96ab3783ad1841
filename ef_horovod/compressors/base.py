"""What a compressor is: a frozen dataclass that turns a vector into a payload of fewer bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ef_horovod import wire
from ef_horovod.arrays import A, Array, float_namespace, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.arrays.numpy import Like
from ef_horovod.common.repr import Shown
from ef_horovod.compressors.payload import Payload as Payload
from ef_horovod.compressors.payload import mean_at_once as mean_at_once
from ef_horovod.errors import NonFiniteError, PayloadError

DEFAULT_KEY = Key()
_LONGEST = 2**40  # numbers; no vector of a model is longer


@dataclass(frozen=True)
class Compressor(Shown):
    """Base of all compressors.

    A subclass gives `body_nbytes`, `encode` and `accumulate`, states its properties as data
    (`allreducible`, `unbiased`, `contraction`, `variance`) and lists `examples` for the contract
    tests.
    x is a vector of d float32 numbers; other shapes are flattened, other float types converted.
    """

    wire_id: ClassVar[int]
    # Whether `encode` takes a share s for `residual` too, and leaves x - s C(x): `Scaled` asks.
    weighs_residual: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "accumulate" in cls.__dict__:
            # Inherited ones would not read what this class writes.
            for name in ("mean", "least_nbytes", "require_body"):
                if name not in cls.__dict__:
                    setattr(cls, name, vars(Compressor)[name])

    @property
    def fixed_size(self) -> bool:
        """Whether a payload's size follows from d alone, so that all ranks' are equally long."""
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
        """Whether it is a contraction for vectors of every length, as methods have to ask.

        `QSGD(100, bucket=None)` is one for a thousand numbers, and far from it for a million.
        """
        return self.contraction(_LONGEST) is not None

    @property
    def supports_error_feedback(self) -> bool:
        """Whether an error memory stays bounded with it, whatever bounded gradients come.

        True for contractions. A bound of another kind serves as well: an absolute one, as that of
        `HardThreshold`, or a contraction in another norm, as those of `OneBit("l2")` and of
        `TernGrad` with a clip.
        """
        return self.contracts

    @classmethod
    def examples(cls) -> tuple[Compressor, ...]:
        """Instances for the contract tests, the docs table and the benchmarks."""
        raise NotImplementedError(f"{cls.__name__} must list examples() for the contract tests")

    def body_nbytes(self, d: int) -> int:
        """Exact size of a body for d elements; the smallest one if not `fixed_size`."""
        raise NotImplementedError

    def encode(self, x: Array, key: Key, *, residual: bool) -> tuple[np.ndarray, ...]:
        """The parts of a payload's body, on the host.

        Args:
            x: float32[d], flat; becomes x - C(x) in place if `residual`, else stays untouched.
            key: what random draws depend on.

        Raises:
            NonFiniteError: through `require_finite`; x may be in any state then.
        """
        raise NotImplementedError

    @classmethod
    def least_nbytes(cls, d: int) -> int:
        """The fewest bytes that a body for d elements has, whatever the options are.

        Receivers ask before they make room for d numbers. It must not fall as d grows; 0 is always
        right, but then a damaged length is only noticed when the memory is there.
        """
        return 0

    @classmethod
    def require_body(cls, body: np.ndarray, d: int) -> None:
        """Raise unless a body can be one for d elements; takes no memory for d numbers.

        Raises:
            PayloadError: it cannot.
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
        """out = sum of C(x_i) / workers + plus in one pass over memory, where a class can do that.

        Args:
            bodies: of the x_i, in the order in which they are added; they may be fewer than
                `workers`. All are checked before anything is written.
            plus: float32[d], or None for nothing.
            out: float32[d].

        Returns:
            Whether it is done; the numbers are those of `accumulate` on zeros, to the last bit.

        Raises:
            PayloadError: a body is malformed.
        """
        return False

    @classmethod
    def summands(cls, body: np.ndarray) -> np.ndarray:
        """The float32 part of a linear compressor's body, as a view: what may be summed."""
        raise NotImplementedError

    def nbytes(self, d: int) -> int:
        """Exact size of a payload for d elements, in bytes; see `body_nbytes`."""
        return wire.HEADER_NBYTES + self.body_nbytes(d)

    def compress(self, x: A, key: Key = DEFAULT_KEY) -> Payload[A]:
        """Compress x; pure: x stays untouched and the same x and key give the same bytes.

        Args:
            x: floating-point array of any shape, of NumPy or torch.
            key: what random compressors draw from; a step must not reuse the last step's key.

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
        return self._payload(self.encode(flat, key, residual=False), flat.shape[0], xp.like(x))

    def compress_with_residual(self, x: A, key: Key = DEFAULT_KEY) -> tuple[Payload[A], A]:
        """Compress x and return what was lost as well: (payload, x - C(x)).

        The residual may take x's memory: do not use x afterwards. It is float32, or float64 for a
        float64 x, in x's shape.

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
        payload = self._payload(self.encode(flat, key, residual=True), flat.shape[0], xp.like(x))
        return payload, xp.shaped(flat, xp.like(x))

    def skip(self, x: Array, key: Key = DEFAULT_KEY) -> Payload:
        """A payload of the usual size for x that says only: drop this step on all ranks.

        Where sizes follow from the key, and messages may be summed, it is the size for that key.
        """
        d = int(np.prod(x.shape))
        if self.allreducible and not self.fixed_size:
            return self.skip_like_zeros(x, key)
        body = np.zeros(self.body_nbytes(d), np.uint8)
        return self._payload((body,), d, namespace(x).like(x)).as_skip()

    def skip_like_zeros(self, x: Array, key: Key) -> Payload:
        """`skip`, with the body of a message of zeros: for those whose `summands` look at it."""
        nothing = self.compress(np.zeros(int(np.prod(x.shape)), np.float32), key)
        return nothing.flagged(wire.SKIP, namespace(x).like(x))

    def absent(self, x: Array) -> Payload:
        """A payload for x that says nothing in this step: it counts as zeros."""
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


def require_finite(number: Any, compressor: Compressor) -> None:
    """Raise unless `number` (a sum, a maximum, the kept values) is finite.

    Raises:
        NonFiniteError: it is not.
    """
    if not np.all(np.isfinite(number)):
        raise NonFiniteError(
            f"{compressor} got a vector with a NaN or an infinity, expected finite numbers; "
            "skip this step, or lower the learning rate or loss scale"
        )


def _checked(x: Array, key: Key) -> Any:
    """The array functions for x, if it can be compressed with a key."""
    if not isinstance(key, Key):
        raise TypeError(
            f"got key={key!r}, expected an ef.Key; write for example ef.Key(seed=0, step=3)"
        )
    return float_namespace(x)
