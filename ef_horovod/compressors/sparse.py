"""Shared code of sparsifiers: they send some entries with their places and drop the others."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from ef_horovod.arrays import Array, means, namespace
from ef_horovod.arrays.keys import Key
from ef_horovod.arrays.numpy_indices import indices_nbytes
from ef_horovod.common.options import keep_choice, keep_flag
from ef_horovod.compressors.base import Compressor, require_finite
from ef_horovod.errors import PayloadError
from ef_horovod.wire import Fields

Scale = Literal["contractive", "unbiased"]
HEAD_NBYTES = 16  # of places that follow from a seed; the values after it are aligned
_COUNT = struct.Struct("<I")  # k


class Places(Protocol):
    """Places of a payload's entries: k different places, in the order of the values."""

    @property
    def size(self) -> int:
        """k."""

    def put(self, x: Array, values: np.ndarray) -> None:
        """x = values there."""

    def add(self, x: Array, values: np.ndarray, weight: float) -> None:
        """x += weight * values there.

        Raises:
            PayloadError: a received code of the places is damaged; x is not changed then.
        """


class Entries(NamedTuple):
    """Single entries, by their indices."""

    indices: Array  # int64[k], where x is or on the host

    @property
    def size(self) -> int:
        return int(self.indices.shape[0])

    def put(self, x: Array, values: np.ndarray) -> None:
        namespace(x).scatter_put(x, self.indices, values)

    def add(self, x: Array, values: np.ndarray, weight: float) -> None:
        namespace(x).scatter_add(x, self.indices, values, weight)


class Coded(NamedTuple):
    """Single entries, by the code of their ascending indices, which is decoded where x is."""

    code: np.ndarray  # uint8[indices_nbytes(k, d)]
    size: int

    def entries(self, x: Array) -> Entries:
        return Entries(namespace(x).decode_indices(x, self.code, self.size))

    def put(self, x: Array, values: np.ndarray) -> None:
        self.entries(x).put(x, values)

    def add(self, x: Array, values: np.ndarray, weight: float) -> None:
        self.entries(x).add(x, values, weight)


class Chosen(NamedTuple):
    """The entries of a vector that a sparsifier keeps."""

    head: tuple[np.ndarray, ...]  # parts of the body that encode the places
    places: Places
    values: np.ndarray  # float32[k] on the host: the entries unchanged, not a view of x


class Sparsifier(Compressor):
    """Base of compressors that send some entries, unchanged or all times one constant.

    A subclass chooses the entries (`choose`), codes their places (`read`, `places_nbytes`) and
    gives their number (`count`). A body is the places, then k float32 values. `Then` codes the
    values by another compressor instead.
    """

    sends_entries: ClassVar[bool] = True
    ascending: ClassVar[bool] = False  # whether received places are `Coded`

    def gain(self, d: int) -> float:
        """Factor of the entries that are sent: 1 if they are unchanged."""
        return 1.0

    def count(self, d: int) -> int:
        """k for d elements; the smallest k if not `fixed_size`."""
        raise NotImplementedError

    def places_nbytes(self, d: int) -> int:
        """Exact size of the places of `count(d)` entries."""
        return HEAD_NBYTES

    def choose(self, x: Array, key: Key) -> Chosen:
        """The entries of float32[d] x to send; x is not changed.

        Raises:
            NonFiniteError: x has a NaN or an infinity.
        """
        raise NotImplementedError

    @classmethod
    def read(cls, fields: Fields, d: int) -> Places:
        """The places at the start of a body, all below d.

        Call `fields.require_values(k)` before allocating k places, because k is not trusted.

        Raises:
            PayloadError: there are no valid places. Those that are `Coded` raise it when used.
        """
        raise NotImplementedError

    def amplified(self, values: np.ndarray, d: int) -> np.ndarray:
        """The entries times the gain; the same array for a gain of 1.

        Raises:
            NonFiniteError: a product overflows.
        """
        gain = self.gain(d)
        if gain == 1:
            return values
        with np.errstate(over="ignore"):  # rejected below
            sent = values * np.float32(gain)
        require_finite(sent, self)
        return sent

    def body_nbytes(self, d: int) -> int:
        return self.places_nbytes(d) + 4 * self.count(d)

    def encode(self, x: Array, key: Key, *, residual: bool) -> tuple[np.ndarray, ...]:
        head, places, values = self.choose(x, key)
        sent = self.amplified(values, x.shape[0])
        if residual:
            places.put(x, values - sent)
        return *head, sent.astype("<f4", copy=False)

    @classmethod
    def require_body(cls, body: np.ndarray, d: int) -> None:
        cls._read_all(body, d)

    @classmethod
    def accumulate(cls, body: np.ndarray, dense: Array, weight: float) -> None:
        places, values = cls._read_all(body, dense.shape[0])
        places.add(dense, values, weight)

    @classmethod
    def mean(
        cls, bodies: Sequence[np.ndarray], workers: int, plus: np.ndarray | None, out: np.ndarray
    ) -> bool:
        if not cls.ascending:
            return False
        places, values = zip(*(cls._read_all(body, out.size) for body in bodies), strict=True)
        indices = [each.entries(out).indices for each in places]
        means.mean_of_entries(indices, values, workers, plus, out)
        return True

    @classmethod
    def clear(cls, body: np.ndarray, x: Array) -> None:
        places, values = cls._read_all(body, x.shape[0])
        places.put(x, np.zeros_like(values))

    @classmethod
    def _read_all(cls, body: np.ndarray, d: int) -> tuple[Places, np.ndarray]:
        fields = Fields(body, cls.__name__, _require_plain)
        places = cls.read(fields, d)
        values = fields.array("<f4", places.size)
        fields.end()
        return places, values

    @classmethod
    def summands(cls, body: np.ndarray) -> np.ndarray:
        return body[HEAD_NBYTES:].view("<f4")


class RandomSparsifier(Sparsifier):
    """Base of sparsifiers whose places follow from a seed.

    A subclass has the fields `shared` (whether all ranks draw the same places) and `scale`.
    """

    shared: bool
    scale: Scale

    def __post_init__(self) -> None:
        keep_flag(self, "shared")
        way_out = "'contractive' is the one for error feedback"
        keep_choice(self, "scale", ("contractive", "unbiased"), way_out)

    def share(self, d: int) -> float:
        """The fraction of d entries that is kept, on average."""
        return self.count(d) / max(d, 1)

    @property
    def allreducible(self) -> bool:
        return self.shared

    @property
    def unbiased(self) -> bool:
        return self.scale == "unbiased"

    def contraction(self, d: int) -> float | None:
        return None if self.unbiased else self.share(d)

    def variance(self, d: int) -> float | None:
        return self.gain(d) - 1 if self.unbiased else None

    def gain(self, d: int) -> float:
        return d / max(self.count(d), 1) if self.unbiased else 1.0


def _require_plain(rest: np.ndarray, count: int) -> None:
    """Raise unless `count` float32 values fit into the rest of a body."""
    if 4 * count > rest.size:
        raise PayloadError(
            f"payload has {rest.size} bytes left for {count} values, expected {4 * count}; it was "
            "cut off or damaged on the way"
        )


def coded_nbytes(k: int, d: int) -> int:
    """Exact size of `coded` places."""
    return _COUNT.size + indices_nbytes(k, d)


def coded(x: Array, indices: Array) -> tuple[np.ndarray, np.ndarray]:
    """uint32 k and the code of int64[k] ascending indices of x."""
    count = np.frombuffer(_COUNT.pack(indices.shape[0]), np.uint8)
    return count, namespace(x).encode_indices(x, indices)


def read_coded(fields: Fields, d: int, what: str) -> Coded:
    """Read the output of `coded`; `what` is the compressor's name.

    Raises:
        PayloadError: its length cannot be one for d.
    """
    (k,) = fields.unpack(_COUNT)
    if k > d:
        raise PayloadError(
            f"{what} payload has {k} entries, expected at most {d}; it was damaged on the way"
        )
    code = fields.array("u1", indices_nbytes(k, d))
    fields.require_values(k)
    return Coded(code, k)
