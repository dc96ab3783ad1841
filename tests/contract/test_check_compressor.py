"""check_compressor notices each way in which a compressor can break the contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from ef_horovod.arrays import namespace
from ef_horovod.compressors.base import Compressor
from ef_horovod.compressors.identity import Identity
from ef_horovod.compressors.onebit import OneBit
from ef_horovod.compressors.randomk import RandomK
from ef_horovod.compressors.registry import register_compressor
from ef_horovod.compressors.topk import TopK
from ef_horovod.errors import NonFiniteError, PayloadError
from ef_horovod.testing import check_compressor, each_check
from ef_horovod.wire import Fields

BREAKS: list[tuple[str, type[Compressor], tuple]] = []


# Broken compressors are registered for one test each, under the number 200.
pytestmark = pytest.mark.usefixtures("own_classes")


def breaks(message: str, *arguments):
    """Collect a compressor that check_compressor must refuse with this message."""

    def collect(cls):
        BREAKS.append((message, dataclass(frozen=True)(cls), arguments))
        return cls

    return collect


@breaks("contraction")
class ClaimsTooMuch(OneBit):
    def contraction(self, d):
        return min(1.0, 2.0 / max(d, 1))


@breaks("on average", 0.1)
class ClaimsTooMuchOnAverage(RandomK):
    def contraction(self, d):
        return min(1.0, 1.5 * super().contraction(d))


@breaks("not in")
class ClaimsTheImpossible(OneBit):
    def contraction(self, d):
        return 1.5


@breaks("is biased", 0.3, True, "unbiased")
class ClaimsNoBias(RandomK):
    def encode(self, x, key, *, residual):
        head, values = super().encode(x, key, residual=False)
        values *= np.float32(0.9)
        if residual:
            x -= self._payload((head, values), len(x), namespace(x).like(x)).decompress()
        return head, values


@breaks("variance of at least", 0.3, True, "unbiased")
class ClaimsLittleVariance(RandomK):
    def variance(self, d):
        return 0.8 * super().variance(d)


@breaks("claims unbiased", 0.3, True, "unbiased")
class StatesNoVariance(RandomK):
    def variance(self, d):
        return None


@breaks("clear that misses", None, 2)
class ClearsNothing(TopK):
    @classmethod
    def clear(cls, body, x):
        pass


@breaks("clear that misses", None, 2)
class ClearsAll(TopK):
    @classmethod
    def clear(cls, body, x):
        x[:] = 0


@breaks("compress changed its input", None, 2)
class ChangesInput(TopK):
    def encode(self, x, key, *, residual):
        return super().encode(x, key, residual=True)


@breaks("same x and key")
class HasMemory(Identity):
    calls: ClassVar[list] = []

    def encode(self, x, key, *, residual):
        (values,) = super().encode(x, key, residual=residual)
        self.calls.append(None)
        if len(values) > 7:
            values[7] *= 1 + len(self.calls) % 2 * 2.0**-22
        return (values,)


@breaks("global random generator")
class DrawsGlobally(Identity):
    def encode(self, x, key, *, residual):
        np.random.random()
        return super().encode(x, key, residual=residual)


@breaks("says nbytes")
class MiscountsBytes(Identity):
    def body_nbytes(self, d):
        return 4 * d + 1


@breaks("breaks x = C\\(x\\) \\+ residual", None, 2)
class LosesResidual(TopK):
    def encode(self, x, key, *, residual):
        parts = super().encode(x, key, residual=residual)
        if residual:
            namespace(x).fill(x, 0.0)
        return parts


@breaks("for torch than for numpy")
class DependsOnFramework(Identity):
    def encode(self, x, key, *, residual):
        (values,) = super().encode(x, key, residual=residual)
        return (values if isinstance(x, np.ndarray) else np.nextafter(values, np.float32(9)),)


@breaks("zeros into something else")
class InventsNumbers(OneBit):
    def encode(self, x, key, *, residual):
        scale, bits = super().encode(x, key, residual=residual)
        return np.where(scale == 0, np.float32(1), scale), bits


@breaks("lets")
class LetsInfinityThrough(OneBit):
    def encode(self, x, key, *, residual):
        try:
            return super().encode(x, key, residual=residual)
        except NonFiniteError:
            return np.ones(1, "<f4"), np.zeros((len(x) + 7) // 8, np.uint8)


@breaks("refuses finite entries")
class RefusesLargeNumbers(Identity):
    def encode(self, x, key, *, residual):
        if namespace(x).abs_max(x) > 1e38:
            raise NonFiniteError("too large")
        return super().encode(x, key, residual=residual)


@breaks("decodes \\d+ bytes, expected")
class IgnoresLength(Identity):
    @classmethod
    def accumulate(cls, body, dense, weight):
        values = body[: body.size // 4 * 4].view("<f4")[: len(dense)]
        part, xp = dense[: len(values)], namespace(dense)
        xp.add(part, xp.from_host(values), weight)


@breaks("expected PayloadError")
class RaisesOtherErrors(Identity):
    def body_nbytes(self, d):
        return 1 + 4 * d

    def encode(self, x, key, *, residual):
        return np.ones(1, np.uint8), *super().encode(x, key, residual=residual)

    @classmethod
    def accumulate(cls, body, dense, weight):
        assert body[0] == 1, "damaged"
        super().accumulate(body[1:], dense, weight)

    @classmethod
    def summands(cls, body):
        return super().summands(body[1:])


@breaks("writes before it refuses")
class WritesTooEarly(OneBit):
    @classmethod
    def accumulate(cls, body, dense, weight):
        try:
            super().accumulate(body, dense, weight)
        finally:
            if len(body) >= 4 and not 0 <= body[:4].view("<f4")[0] < np.inf:
                dense[:1] += 1


@breaks("writes outside")
class WritesOutside(Identity):
    def body_nbytes(self, d):
        return 4 + 4 * d

    def encode(self, x, key, *, residual):
        return np.zeros(1, "<u4"), *super().encode(x, key, residual=residual)

    @classmethod
    def accumulate(cls, body, dense, weight):
        offset = int(Fields(body, cls.__name__).array("<u4", 1)[0]) % 1000
        if offset and isinstance(dense.base, np.ndarray):
            dense.base[2048 + len(dense) + offset] += 1  # what an unchecked kernel would do
        super().accumulate(body[4:], dense, weight)

    @classmethod
    def summands(cls, body):
        return super().summands(body[4:])


@breaks("add_to")
class IgnoresWeight(Identity):
    @classmethod
    def accumulate(cls, body, dense, weight):
        super().accumulate(body, dense, 1.0)


@breaks("mean of other numbers")
class AveragesItsOwnWay(OneBit):
    @classmethod
    def mean(cls, bodies, workers, plus, out):
        return super().mean(bodies, workers + 1, plus, out)


@breaks("mean that takes what add_to refuses")
class AveragesAnything(OneBit):
    @classmethod
    def mean(cls, bodies, workers, plus, out):
        try:
            return super().mean(bodies, workers, plus, out)
        except PayloadError:
            nothing = np.zeros(4 + (out.size + 7) // 8, np.uint8)
            return super().mean([nothing for _ in bodies], workers, plus, out)


@breaks("not linear|is a copy")
class ClaimsLinear(OneBit):
    allreducible = True

    @classmethod
    def summands(cls, body):
        return body[:4].view("<f4")


@breaks("is a copy")
class CopiesSummands(Identity):
    @classmethod
    def summands(cls, body):
        return super().summands(body).copy()


@breaks("not shared", 0.1, False)
class IgnoresRank(RandomK):
    def encode(self, x, key, *, residual):
        return super().encode(x, key._replace(rank=0), residual=residual)


@breaks("though it is shared", 0.1)
class IgnoresShared(RandomK):
    def encode(self, x, key, *, residual):
        return super().encode(x, key._replace(seed=key.rank), residual=residual)


@breaks("other bytes than its flat copy")
class DependsOnShape(Identity):
    def compress(self, x, key=None):
        return super().compress(x.T if x.ndim == 2 else x, key)


@breaks("decompresses (float16|bfloat16|float64) to")
class ForgetsDtype(Identity):
    def _payload(self, parts, d, like):
        dtype = np.dtype(np.float32) if isinstance(like.dtype, np.dtype) else like.dtype
        return super()._payload(parts, d, like._replace(dtype=dtype))


@pytest.mark.parametrize(
    ("message", "cls", "arguments"), BREAKS, ids=[cls.__name__ for _, cls, _ in BREAKS]
)
def test_broken_clause_is_named(message, cls, arguments):
    broken = register_compressor(200)(cls)(*arguments)
    with pytest.raises(AssertionError, match=message) as caught:
        check_compressor(broken, frameworks=("numpy", "torch"))
    assert cls.__name__ in str(caught.value)


def test_unregistered_compressor_is_refused():
    @dataclass(frozen=True)
    class Unregistered(Identity):
        pass

    with pytest.raises(AssertionError, match="not registered"):
        check_compressor(Unregistered())


def test_third_party_compressor_passes():
    @register_compressor(201)
    @dataclass(frozen=True)
    class Halves(Compressor):
        """A third party's: the first half of the entries."""

        def contraction(self, d):
            return None

        @classmethod
        def examples(cls):
            return (cls(),)

        def body_nbytes(self, d):
            return 4 * (d // 2)

        def encode(self, x, key, *, residual):
            (values,) = Identity().encode(x, key, residual=False)
            if residual:
                x[: len(x) // 2] = 0
            return (values[: len(x) // 2],)

        @classmethod
        def accumulate(cls, body, dense, weight):
            fields = Fields(body, cls.__name__)
            values = fields.array("<f4", len(dense) // 2)
            fields.end()
            xp = namespace(dense)
            xp.add(dense[: len(dense) // 2], xp.from_host(values), weight)

    check_compressor(Halves(), frameworks=("numpy", "torch"))


def test_properties_choose_the_checks():
    def names(compressor):
        return {check.func.__name__ for check in each_check(compressor)}

    assert "check_linear" in names(Identity())
    assert "check_linear" not in names(TopK(k=1))
    assert "check_unbiased" not in names(RandomK(0.1))
    assert {"check_unbiased", "check_linear"} <= names(RandomK(0.1, scale="unbiased"))
    assert "check_contraction" not in names(RandomK(0.1, scale="unbiased"))
