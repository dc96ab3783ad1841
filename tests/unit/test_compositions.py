"""Then and Scaled: what follows from the constants of the parts, sizes, what is refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import ef_horovod as ef
from ef_horovod.compressors.sparse import Sparsifier
from ef_horovod.testing import check_vector

KEY = ef.Key(seed=3, step=1)
DRAWS = 3000
X = np.random.default_rng(0).normal(size=120).astype(np.float32)
SPARSIFIERS = [
    ef.TopK(ratio=0.2),
    ef.HardThreshold(0.7),
    ef.RandomK(0.25),
    ef.RandomK(0.25, shared=False, scale="unbiased"),
    ef.RandomBlock(0.25, block=7, scale="unbiased"),
    ef.RandomSparsify(0.25),
    ef.RandomSparsify(0.25, scale="unbiased"),
]
VALUES = [
    ef.Natural(),
    ef.Cast("bfloat16"),
    ef.TruncateMantissa(3),
    ef.QSGD(127),
    ef.NaturalDithering(7),
    ef.Scaled(ef.TernGrad()),
    ef.OneBit(),
    ef.Identity(),
]
PAIRS = list(itertools.product(SPARSIFIERS, VALUES))
each_pair = pytest.mark.parametrize(("sparsifier", "values"), PAIRS, ids=repr)
UNBIASED = [ef.Natural(), ef.QSGD(1), ef.QSGD(7), ef.TernGrad(), ef.NaturalDithering(2)]


def draws(compressor, x, count=DRAWS):
    return np.array(
        [compressor.compress(x, ef.Key(7, t)).decompress() for t in range(count)], float
    )


def losses(compressor, x, count=DRAWS):
    """float64[count] of ||x - C(x)||^2 / ||x||^2."""
    x64 = x.astype(float)
    return ((draws(compressor, x, count) - x64) ** 2).sum(1) / (x64 @ x64)


def uncertainty(samples):
    return 5 * samples.std() / math.sqrt(len(samples)) + 1e-6


# Then


@each_pair
def test_any_pair_keeps_the_contract_of_vectors(sparsifier, values):
    both = ef.Then(sparsifier, values)
    for d in (0, 1, 2, 9, 300):
        x = np.random.default_rng(d).normal(size=d).astype(np.float32)
        check_vector(both, x, ("numpy", "torch"))


@each_pair
def test_what_is_sent_is_the_second_of_the_first(sparsifier, values):
    """The kept places are those of the sparsifier, and the numbers there a message of their own."""
    kept = sparsifier.compress(X, KEY).decompress()
    both = ef.Then(sparsifier, values).compress(X, KEY)
    places = np.sort(_places(sparsifier, X))
    decoded = both.decompress()
    assert not np.any(np.delete(decoded, places))
    order = _places(sparsifier, X)  # values travel in the order of the draw
    inner = values.compress(kept[order], KEY.apart(5))
    np.testing.assert_array_equal(decoded[order], inner.decompress())
    head = sparsifier.places_nbytes(X.size)
    if sparsifier.fixed_size:
        assert both.nbytes == 16 + 4 + head + values.body_nbytes(len(order))
    else:
        alone = sparsifier.compress(X, KEY).nbytes - 4 * len(order)
        assert both.nbytes == 4 + alone + values.body_nbytes(len(order))


def _places(sparsifier, x):
    return np.concatenate([np.arange(x.size)[part] for part in _slices(sparsifier, x)])


def _slices(sparsifier, x):
    places = sparsifier.choose(x, KEY).places
    runs = getattr(places, "slices", None)
    return [places.indices] if runs is None else [slice(*run) for run in runs]


@each_pair
def test_the_residual_is_what_a_receiver_lacks_to_the_last_bit(sparsifier, values):
    both = ef.Then(sparsifier, values)
    for x in (X * 5, X**5, np.float32([3, 0, -0.0, 1e-30])):
        payload, residual = both.compress_with_residual(x.copy(), KEY)
        decoded = ef.Payload.from_bytes(bytes(payload)).decompress()
        np.testing.assert_array_equal(residual, x - decoded)


@each_pair
def test_constants_hold_on_average(sparsifier, values):
    both, d = ef.Then(sparsifier, values), X.size
    found = losses(both, X, 600)
    delta, omega = both.contraction(d), both.variance(d)
    if delta is not None:
        assert found.mean() <= 1 - delta + uncertainty(found)
    if omega is not None:
        assert found.mean() <= omega + uncertainty(found)
        off = draws(both, X, 600).mean(0) - X
        assert np.linalg.norm(off) < 1.6 * math.sqrt(omega / 600) * np.linalg.norm(X)
    assert (omega is not None) == (sparsifier.unbiased and values.unbiased)


def test_constants_by_hand():
    d = 1000
    assert ef.Then(ef.TopK(k=100), ef.Natural()).contraction(d) == 0.1 * 7 / 8
    assert ef.Then(ef.TopK(k=100), ef.Scaled(ef.Natural())).contraction(d) == 0.1 * (8 / 9)
    assert ef.Then(ef.TopK(k=100), ef.OneBit()).contraction(d) == 0.1 / 100  # of k, not of d
    assert ef.Then(ef.TopK(k=100), ef.QSGD(8, bucket=None)).contraction(d) is None  # 100 / 64 > 1
    assert ef.Then(ef.TopK(k=10), ef.QSGD(8, bucket=None)).contraction(d) == 0.01 * (1 - 10 / 64)
    scaled = ef.Then(ef.RandomK(0.1, scale="unbiased"), ef.Natural())
    assert scaled.variance(d) == 10 * 9 / 8 - 1
    assert scaled.contraction(d) is None
    assert ef.Then(ef.RandomK(0.1, scale="unbiased"), ef.Cast("float16")).variance(d) is None
    assert ef.Then(ef.RandomSparsify(0.1), ef.OneBit()).contraction(d) == 0.1 / d  # k may be d
    assert ef.Then(ef.HardThreshold(1.0), ef.Natural()).contraction(d) is None


def test_the_bound_for_top_k_is_reached():
    """Flat magnitudes at 4 / 3, where Natural's variance is 1 / 8."""
    x = np.full(800, 4 / 3, np.float32)
    both = ef.Then(ef.TopK(ratio=0.25), ef.Natural())
    found = losses(both, x)
    assert found.mean() == pytest.approx(1 - both.contraction(800), abs=uncertainty(found))
    scaled = ef.Then(ef.TopK(ratio=0.25), ef.Scaled(ef.Natural()))
    found = losses(scaled, x)
    assert found.mean() == pytest.approx(1 - 0.25 * 8 / 9, abs=uncertainty(found))


def test_the_bound_for_unbiased_ones_is_reached():
    x = np.full(100, 4 / 3, np.float32)
    both = ef.Then(ef.RandomK(0.25, scale="unbiased"), ef.Natural())  # 4 x 4/3 is as far from 2**e
    found = losses(both, x)
    assert found.mean() == pytest.approx(both.variance(100), abs=uncertainty(found))


def test_the_two_parts_draw_apart():
    """RandomK's seed would follow from the values' draws if both came from one key."""
    seen = []

    class Spy(ef.Natural):
        def encode(self, x, key, *, residual):
            seen.append(key.draw(shared=False))
            return super().encode(x, key, residual=residual)

    ef.Then(ef.RandomK(0.5, shared=False), Spy()).compress(X, KEY)
    assert len(seen) == 1
    assert seen[0] != KEY.draw(shared=False)


@given(
    x=arrays(np.float32, st.integers(0, 60), elements=st.floats(-1e6, 1e6, width=32)),
    pair=st.sampled_from([pair for pair in PAIRS if isinstance(pair[0], ef.TopK)]),
)
@settings(max_examples=200)
def test_top_k_then_anything_of_any_vector(x, pair):
    both = ef.Then(*pair)
    payload, residual = both.compress_with_residual(x.copy(), KEY)
    assert payload.nbytes == both.nbytes(x.size)
    np.testing.assert_array_equal(x - payload.decompress(), residual)
    for framework_free in (both.skip(x), both.absent(x)):
        assert ef.Payload.from_bytes(bytes(framework_free)).num_elements == x.size


def test_sizes_at_one_percent():
    """A kept entry's 32 bits of value become 9; the places cost 8.6 bits in both."""
    d = 10**6
    alone, coded = ef.TopK(0.01).body_nbytes(d), ef.Then(ef.TopK(0.01), ef.Natural()).body_nbytes(d)
    assert 8 * alone / 10**4 == pytest.approx(40.6, abs=0.1)
    assert 8 * coded / 10**4 == pytest.approx(17.6, abs=0.1)
    assert coded == alone - 4 * 10**4 + 4 + ef.Natural().body_nbytes(10**4)


def test_nothing_kept_is_a_message_too():
    for values in VALUES:
        both = ef.Then(ef.HardThreshold(100.0), values)
        payload, residual = both.compress_with_residual(X.copy(), KEY)
        assert payload.nbytes == both.nbytes(X.size)
        assert not payload.decompress().any()
        np.testing.assert_array_equal(residual, X)


def test_a_sum_in_flight_only_if_both_are_linear():
    assert ef.Then(ef.RandomK(0.3), ef.Identity()).allreducible
    assert not ef.Then(ef.RandomK(0.3), ef.Natural()).allreducible
    assert not ef.Then(ef.RandomK(0.3, shared=False), ef.Identity()).allreducible
    assert not ef.Then(ef.TopK(0.3), ef.Identity()).allreducible


def test_it_is_shown_as_it_is_written():
    both = ef.Then(ef.TopK(ratio=0.01), ef.Scaled(ef.QSGD(7, bucket=64)))
    assert repr(both) == "Then(TopK(ratio=0.01), Scaled(QSGD(levels=7, bucket=64)))"
    assert eval(repr(both), vars(ef) | {name: getattr(ef, name) for name in ef.__all__}) == both
    assert repr(ef.ErrorFeedback(both)) == f"ErrorFeedback({both!r})"
    assert repr(ef.NoFeedback(ef.Natural(), server_compressor=ef.Natural())) == (
        "NoFeedback(Natural(), server_compressor=Natural())"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ef.Then(ef.Natural(), ef.TopK(0.1)), r"got Natural\(\) first, expected a sparsif"),
        (lambda: ef.Then(0.1, ef.Natural()), "got 0.1 first"),
        (lambda: ef.Then(ef.TopK(0.1), 0.1), "got 0.1 for the kept values"),
        (lambda: ef.Then(ef.TopK(0.1), ef.RandomK(0.1)), "give the sparsifier a smaller ratio"),
        (
            lambda: ef.Then(ef.TopK(0.1), ef.Then(ef.TopK(0.1), ef.Natural())),
            "give the sparsifier a smaller ratio",
        ),
        (lambda: ef.Scaled(ef.TopK(0.1)), "Scaled got .* take scale='contractive'"),
        (lambda: ef.Scaled(ef.RandomK(0.1, scale="unbiased")), "take scale='contractive' there"),
        (
            lambda: ef.Scaled(ef.Then(ef.RandomK(0.1, scale="unbiased"), ef.Natural())),
            r"write Then\(RandomK",
        ),
        (lambda: ef.Scaled(ef.OneBit()), r"Scaled got OneBit\(\), expected an unbiased compressor"),
        (lambda: ef.Scaled(ef.TernGrad(clip=2.5)), "expected an unbiased compressor"),
        (lambda: ef.Scaled(ef.Scaled(ef.Natural())), "expected an unbiased compressor"),
        (lambda: ef.Scaled("Natural"), "Scaled got 'Natural'"),
    ],
)
def test_what_cannot_be_put_together_is_refused(make, message):
    with pytest.raises(ef.UnsupportedError, match=message):
        make()


# Scaled


@pytest.mark.parametrize("compressor", UNBIASED, ids=repr)
def test_scaled_is_the_compressor_times_its_scale(compressor):
    scaled = ef.Scaled(compressor)
    for x in (X, X[:1], X[:0]):
        scale = np.float32(1 / (1 + compressor.variance(x.size)))
        payload, residual = scaled.compress_with_residual(x.copy(), KEY)
        plain = compressor.compress(x, KEY)
        np.testing.assert_array_equal(payload.decompress(), scale * plain.decompress())
        np.testing.assert_array_equal(residual, x - payload.decompress())
        assert payload.nbytes == plain.nbytes + 8 == scaled.nbytes(x.size)


@pytest.mark.parametrize("compressor", UNBIASED, ids=repr)
def test_scaled_loses_what_the_identity_says(compressor):
    """E||s C(x) - x||^2 = s^2 E||C(x) - x||^2 + (1 - s)^2 ||x||^2, at most omega / (1 + omega)."""
    d, scaled = X.size, ef.Scaled(compressor)
    s, own = scaled.scale(d), losses(compressor, X)
    found = losses(scaled, X)
    expected = s**2 * own.mean() + (1 - s) ** 2
    assert found.mean() == pytest.approx(expected, abs=uncertainty(found) + uncertainty(own))
    assert found.mean() <= 1 - scaled.contraction(d) + uncertainty(found)
    assert scaled.contraction(d) == 1 / (1 + compressor.variance(d))
    assert scaled.contraction(d) >= (compressor.contraction(d) or 0)
    assert not scaled.unbiased
    assert scaled.variance(d) is None


def test_the_scaled_bound_is_reached():
    x = np.full(500, 4 / 3, np.float32)
    found = losses(ef.Scaled(ef.Natural()), x)
    assert found.mean() == pytest.approx(1 / 9, abs=uncertainty(found))
    d = 101  # the worst vector of TernGrad
    x = np.full(d, 1 / (1 + math.sqrt(d)), np.float32)
    x[0] = 1
    found = losses(ef.Scaled(ef.TernGrad()), x)
    assert found.mean() == pytest.approx(1 - 2 / (1 + math.sqrt(d)), abs=uncertainty(found))


def test_the_scale_follows_the_length():
    scaled = ef.Scaled(ef.QSGD(4, bucket=512))
    assert scaled.contraction(100) == 1 / (1 + 10 / 4)
    assert scaled.contraction(10**6) == scaled.contraction(512) == 1 / (1 + math.sqrt(512) / 4)


def test_a_compressor_that_knows_no_shares_is_read_again():
    """As one from outside the package: the same bytes and the same rest, by another way."""

    class Plain(ef.Natural):
        weighs_residual = False

    for x in (X, X**5):
        payload, residual = ef.Scaled(Plain()).compress_with_residual(x.copy(), KEY)
        other, expected = ef.Scaled(ef.Natural()).compress_with_residual(x.copy(), KEY)
        assert bytes(payload) == bytes(other)
        np.testing.assert_array_equal(residual, expected)


def test_a_random_sparsifier_scaled_down_is_the_contractive_one():
    """Why Scaled refuses them: the scale would undo the gain."""
    unbiased, contractive = (ef.RandomK(0.25, scale=s) for s in ("unbiased", "contractive"))
    scale = 1 / (1 + unbiased.variance(120))
    np.testing.assert_allclose(
        scale * unbiased.compress(X, KEY).decompress(), contractive.compress(X, KEY).decompress()
    )
    assert contractive.contraction(120) == pytest.approx(scale)


def test_sparsifiers_are_those_that_send_entries():
    kinds = {type(c).__name__ for c in SPARSIFIERS}
    known = {name for name in ef.__all__ if isinstance(getattr(ef, name), type)}
    own = {name for name in known if issubclass(getattr(ef, name), Sparsifier)}
    assert own == kinds
