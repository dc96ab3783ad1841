"""What a compressor is: a frozen dataclass that turns a vector into a payload of fewer bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ef_horovod import registry, wire
from ef_horovod.arrays import Array, dtype_name, float_namespace, namespace, require_writable
from ef_horovod.arrays.numpy import Like
from ef_horovod.errors import NonFiniteError, PayloadError, without_adapter
from ef_horovod.keys import Key
from ef_horovod.options import number
from ef_horovod.shown import Shown

DEFAULT_KEY = Key()
_LONGEST = 2**40  # numbers; no vector of a model is longer


@dataclass(frozen=True)
class Compressor(Shown):
    """Base of all compressors.

    A subclass gives `body_nbytes`, `encode` and `accumulate`, states its properties as data
    (`linear`, `unbiased`, `contraction`, `variance`) and lists `examples` for the contract tests.
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
    def sized(self) -> bool:
        """Whether a payload's size follows from d alone, so that all ranks' are equally long."""
        return True

    @property
    def linear(self) -> bool:
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
    def suits_feedback(self) -> bool:
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
        """Exact size of a body for d elements; the smallest one of a compressor not `sized`."""
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

    def compress(self, x: Array, key: Key = DEFAULT_KEY) -> Payload:
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

    def squeeze(self, x: Array, key: Key = DEFAULT_KEY) -> tuple[Payload, Array]:
        """Compress x and return what was lost as well: (payload, x - C(x)).

        The residual may take x's memory: do not use x afterwards. It is float32, or float64 for a
        float64 x, in x's shape.

        Raises:
            NonFiniteError: x has a NaN or an infinity; x is lost.
            TypeError: x is not a floating-point array of a supported framework.

        Example:
            >>> import ef_horovod as ef, numpy
            >>> ef.TopK(k=1).squeeze(numpy.array([1.0, -5.0, 2.0], dtype="float32"))[1]
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
        if self.linear and not self.sized:
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


class Payload:
    """A compressed vector, as the bytes that go on the wire.

    `bytes(payload)` are exactly these bytes and `payload.nbytes` is their number.
    """

    def __init__(self, data: np.ndarray, like: Like | None = None) -> None:
        self.data = data  # uint8[nbytes]: header and body
        self.header = wire.read_header(data)
        self._like = like
        self._body = data[wire.HEADER_NBYTES :]
        kind = registry.compressor_of(self.header.kind)
        if kind is None or self.header.body_nbytes != self._body.size:
            raise PayloadError(
                f"payload of kind {self.header.kind} has {self._body.size} bytes of body, expected "
                f"a registered kind and {self.header.body_nbytes} bytes; import the module that "
                "defines the compressor on all ranks, or look for damage on the way"
            )
        self.kind = kind

    @classmethod
    def from_bytes(
        cls,
        data: bytes | bytearray | memoryview | np.ndarray,
        num_elements: int | None = None,
    ) -> Payload:
        """Read a payload that came over a wire; it decompresses to a flat NumPy float32 array.

        Args:
            data: the bytes.
            num_elements: length of the vector, where it is known. Without it a sparse payload of a
                few bytes may say that it is of 2**31 - 1 numbers, and be right.

        Raises:
            PayloadError: the bytes are not a payload, or one of another length. Damage inside the
                body shows, as the same error, when the payload is decompressed.

        Example:
            >>> import ef_horovod as ef, numpy
            >>> sent = bytes(ef.OneBit().compress(numpy.array([1.0, -3.0])))
            >>> ef.Payload.from_bytes(sent).decompress()
            array([ 2., -2.], dtype=float32)
        """
        payload = cls(np.frombuffer(data, np.uint8))
        if num_elements is not None and payload.num_elements != num_elements:
            raise PayloadError(
                f"got {payload}, expected {num_elements} elements; it is of another vector, or was "
                "damaged on the way"
            )
        return payload

    @classmethod
    def from_start(cls, data: np.ndarray) -> Payload:
        """The payload at the start of uint8[m]; what follows it is padding."""
        return cls(data[: wire.HEADER_NBYTES + wire.read_header(data).body_nbytes])

    def __iter__(self) -> Any:
        """Not there: stock Horovod asks for it, to which a compressor was given as it is."""
        raise without_adapter(self)

    @property
    def nbytes(self) -> int:
        """Size on the wire, header included."""
        return int(self.data.size)

    @property
    def num_elements(self) -> int:
        """Length of the compressed vector."""
        return self.header.num_elements

    @property
    def is_skip(self) -> bool:
        """Whether the sender asks all ranks to drop this step."""
        return bool(self.header.flags & wire.SKIP)

    @property
    def is_absent(self) -> bool:
        """Whether the sender says nothing in this step."""
        return bool(self.header.flags & wire.ABSENT)

    @property
    def is_replacement(self) -> bool:
        """Whether this takes the place of what was tracked, and is not added to it."""
        return bool(self.header.flags & wire.REPLACE)

    def as_replacement(self) -> Payload:
        """The same numbers, to take the place of what was tracked."""
        return self.flagged(wire.REPLACE, self._like)

    def flagged(self, flag: int, like: Like | None) -> Payload:
        """The same body with a flag more in the header, to decompress to an array like `like`."""
        header = self.header._replace(flags=self.header.flags | flag)
        return Payload(np.concatenate([header.pack(), self._body]), like)

    def as_skip(self) -> Payload:
        """A payload of the same kind and size that says only: drop this step."""
        header = self.header._replace(flags=wire.SKIP)
        body = np.zeros(self._body.size, np.uint8)
        return Payload(np.concatenate([header.pack(), body]), self._like)

    def __bytes__(self) -> bytes:
        return self.data.tobytes()

    def __repr__(self) -> str:
        return f"<{self.kind.__name__} payload: {self.num_elements} elements, {self.nbytes} bytes>"

    def decompress(self) -> Array:
        """C(x): same framework, shape, dtype and device as the x that was compressed here.

        Raises:
            PayloadError: the body is malformed, cannot be one for as many numbers as the header
                says, or there is no memory for so many; or the payload asks to drop the step.
        """
        like = self._like
        if like is None:
            flat = self._room()
            self.add_to(flat)
            return flat
        flat = like.xp.zeros(self.num_elements, like.device)
        self.add_to(flat)
        return like.xp.restore(flat, like)

    def _room(self) -> np.ndarray:
        """float32[d] of zeros, where the body can be one for d elements."""
        self._require_numbers()
        if not self.is_absent:
            self.kind.require_body(self._body, self.num_elements)
        try:
            return np.zeros(self.num_elements, np.float32)
        except MemoryError:
            raise PayloadError(
                f"got {self}, expected at most as many elements as there is memory for; give "
                "Payload.from_bytes the length that is expected, or look for damage on the way"
            ) from None

    def add_to(self, dense: Array, weight: float = 1.0) -> None:
        """dense += weight * C(x), without building C(x) where it is sparse.

        Args:
            dense: float32[d], contiguous.

        Raises:
            PayloadError: the body is malformed; dense is untouched then.
            TypeError: dense is no array of a supported framework.
            ValueError: dense has another length, dtype or layout, or cannot be changed in place.
        """
        self._require(dense)
        weight = number("add_to", "weight", weight, "(-inf, inf)", "1 adds C(x) as it is")
        if not self.is_absent:
            self.kind.accumulate(self._body, dense, weight)

    def _require(self, dense: Array) -> None:
        """Raise unless the payload has numbers and `dense` is fit to take them."""
        namespace(dense)  # which raises for what is no array
        if tuple(dense.shape) != (self.num_elements,) or dtype_name(dense) != "float32":
            raise ValueError(
                f"got a dense array of shape {tuple(dense.shape)} and dtype {dense.dtype}, "
                f"expected float32[{self.num_elements}]; flatten or convert it first"
            )
        require_writable(dense)
        self._require_numbers()

    def _require_numbers(self) -> None:
        if self.is_skip:
            raise PayloadError(
                "got a payload that asks to drop the step, expected one with numbers; check "
                "is_skip on the payloads of all ranks before using any of them"
            )

    def summands(self) -> np.ndarray:
        """The float32 numbers of a linear compressor's payload, as a view that may be summed into.

        After an allreduce over this view, the payload stands for the sum over all ranks.
        """
        return self.kind.summands(self._body)


def mean_at_once(messages: Sequence[Payload], workers: int, out: Array, plus: Array | None) -> bool:
    """`Compressor.mean` of messages, if their class can, and they are not longer than float32[d].

    Raises:
        PayloadError, ValueError: as `Payload.add_to`; `out` is untouched then.
    """
    for message in messages:
        message._require(out)
    said = [message for message in messages if not message.is_absent]
    host, more = (x if x is None else namespace(x).host_view(x) for x in (out, plus))
    kinds = {message.kind for message in said}
    long = sum(message.nbytes for message in said) > 4 * out.shape[0]  # so would be their indices
    if host is None or (more is None) != (plus is None) or len(kinds) != 1 or long:
        return False
    return kinds.pop().mean([message._body for message in said], workers, more, host)


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
