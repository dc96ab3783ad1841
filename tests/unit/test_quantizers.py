"""Compressors of fixed width: their constants in numbers, the ends of the range, the grid."""

from __future__ import annotations

import math

import numpy as np
import pytest

import ef_horovod as ef
from ef_horovod.arrays import keys
from ef_horovod.arrays import numpy_quantize as host
from ef_horovod.arrays.grid import Grid

D, COPIES = 200, 5000
X = np.random.default_rng(0).normal(size=D).astype(np.float32)
KEY = ef.Key(seed=3, step=1)
LARGEST = np.finfo(np.float32).max
QUANTIZERS = [
    ef.TruncateMantissa(3),
    ef.QSGD(7, bucket=100),
    ef.QSGD(5, bucket=None),
    ef.QSGD(300, bucket=9),
    ef.TernGrad(),
    ef.TernGrad(clip=1.5, bucket=11),
    ef.Natural(),
    ef.NaturalDithering(4, bucket=13),
    ef.NaturalDithering(127, norm=math.inf),
    ef.RandomBlock(0.2, block=7),
    ef.RandomBlock(0.2, block=7, scale="unbiased"),
    ef.OneBit("l2"),
    ef.OneBit("l2", block=11),
    ef.OneBit("l1", block=64),
    ef.OneBit("two_means"),
    ef.OneBit("two_means", block=7),
]
each = pytest.mark.parametrize("compressor", QUANTIZERS, ids=repr)


def draws(compressor, x=X):
    """float64[COPIES, d]: C(x) for independent draws; the compressor has buckets of x's length."""
    many = np.tile(x.astype(np.float32), COPIES)
    return compressor.compress(many, KEY).decompress().reshape(COPIES, x.size).astype(float)


def relative_variance(decoded, x=X):
    x = x.astype(float)
    return ((decoded - x) ** 2).sum(1).mean() / (x @ x)


def rounding_variance(place, levels):
    """sum (b - z)(z - a) for z between neighbouring levels a and b."""
    above = np.clip(np.searchsorted(levels, place, side="left"), 1, None)
    return float(((levels[above] - place) * (place - levels[above - 1])).sum())


@pytest.mark.parametrize(
    ("compressor", "d", "body"),
    [
        (ef.TruncateMantissa(3), 1000, 8 + 1500),
        (ef.TruncateMantissa(7), 3, 8 + 6),
        (ef.QSGD(7), 1024, 8 + 2 * 4 + 512),
        (ef.QSGD(8, bucket=None), 1000, 8 + 4 + 625),
        (ef.QSGD(127, bucket=None), 1000, 8 + 4 + 1000),
        (ef.TernGrad(), 1000, 4 + 4 + 200),
        (ef.TernGrad(bucket=100), 1001, 4 + 4 * 11 + 201),
        (ef.Natural(), 1000, 4 + 1125),
        (ef.NaturalDithering(7), 1000, 8 + 4 + 500),
        (ef.RandomBlock(0.01), 100_000, 16 + 4000),
        (ef.OneBit(block=100), 1000, 8 + 40 + 125),
        (ef.OneBit("two_means"), 1000, 8 + 8 + 125),
        (ef.OneBit("l2"), 1000, 4 + 125),
    ],
)
def test_bytes_by_hand(compressor, d, body):
    assert len(bytes(compressor.compress(np.ones(d, np.float32)))) == 16 + body


def test_sizes_for_resnet_18():
    """Section 8 of the notes, with scales a bucket where there are any."""
    d = 11_173_962
    assert ef.OneBit("two_means").body_nbytes(d) == 8 + 8 + 1_396_746
    assert ef.Natural().body_nbytes(d) == 4 + math.ceil(9 * d / 8)
    assert ef.QSGD(127, bucket=None).body_nbytes(d) == 8 + 4 + d
    assert ef.TernGrad().body_nbytes(d) / (2 * d / 8) < 0.8001


@each
def test_residual_is_what_a_receiver_lacks_to_the_last_bit(compressor):
    for x in (X * 5, X**5, X * np.float32(1e-42), X * np.float32(1e30), np.float32([3, 0, -0.0])):
        payload, residual = compressor.compress_with_residual(x.copy(), KEY)
        decoded = ef.Payload.from_bytes(bytes(payload)).decompress()
        assert np.array_equal(x - decoded, residual)


@each
def test_bytes_do_not_depend_on_what_is_around(compressor):
    """Views that are not aligned to anything, and chunks of all sizes, give the same codes."""
    x = np.random.default_rng(4).normal(size=5120 * 3 + 41).astype(np.float32)
    expected = bytes(compressor.compress(x, KEY))
    room = np.empty(4 * x.size + 1, np.uint8)
    shifted = room[1:].view(np.float32)
    shifted[:] = x
    assert bytes(compressor.compress(shifted, KEY)) == expected
    received = bytearray(b"?" + expected)
    again = ef.Payload.from_bytes(memoryview(received)[1:]).decompress()
    assert np.array_equal(again, compressor.compress(x, KEY).decompress())


@each
@pytest.mark.parametrize("d", [1, 39, 40, 41, 5119, 5120, 5121])
def test_chunks_end_where_they_should(compressor, d):
    x = np.random.default_rng(d).normal(size=d).astype(np.float32)
    payload, residual = compressor.compress_with_residual(x.copy(), KEY)
    assert np.array_equal(x - payload.decompress(), residual)
    again = np.zeros(d, np.float32)
    payload.add_to(again, -2.0)
    np.testing.assert_allclose(again, -2 * payload.decompress(), rtol=1e-6)


@each
def test_a_block_of_zeros_beside_others_stays_zero(compressor):
    """Both reference implementations of QSGD divide by a norm of zero."""
    x = np.random.default_rng(1).normal(size=300).astype(np.float32)
    x[100:200] = 0
    with np.errstate(all="raise"):
        decoded = compressor.compress(x, KEY).decompress()
    assert np.all(np.isfinite(decoded))
    if not isinstance(compressor, ef.OneBit):
        assert not decoded[100:200].any()


# QSGD


@pytest.mark.parametrize(("s", "found"), [(1, 10.2), (4, 1.82), (16, 0.132), (64, 0.0080)])
def test_qsgd_is_unbiased_with_the_variance_of_rounding(s, found):
    qsgd = ef.QSGD(s, bucket=D)
    decoded = draws(qsgd)
    norm = np.linalg.norm(X.astype(float))
    place = np.abs(X.astype(float)) * s / norm
    exact = rounding_variance(place, np.arange(s + 1)) / s**2
    assert relative_variance(decoded) == pytest.approx(exact, rel=0.05)
    assert exact == pytest.approx(found, rel=0.15)
    assert exact <= qsgd.variance(D) == min(D / s**2, math.sqrt(D) / s)
    spread = np.sqrt(exact * norm**2 / COPIES)
    assert np.linalg.norm(decoded.mean(0) - X) < 1.5 * spread
    levels = np.unique(np.round(np.abs(decoded) * s / norm, 4))
    assert np.array_equal(levels, np.round(levels))


def test_qsgd_with_many_levels_is_as_fine_as_it_says():
    """A reference sends levels above 127 as float16, which has 11 bits."""
    x = np.random.default_rng(2).normal(size=4000).astype(np.float32)
    decoded = ef.QSGD(32767, bucket=None).compress(x, KEY).decompress()
    assert np.abs(decoded - x).max() <= 1.001 * np.linalg.norm(x) / 32767


def test_qsgd_counts_blocks_by_their_own_length():
    assert ef.QSGD(4).variance(10**6) == ef.QSGD(4).variance(512) == math.sqrt(512) / 4
    assert ef.QSGD(4).variance(100) == math.sqrt(100) / 4
    assert ef.QSGD(4, bucket=None).variance(10**4) == 25
    assert ef.QSGD(64).contraction(10**6) == 1 - 512 / 64**2
    assert ef.QSGD(4).contraction(10**6) is None


# TernGrad


def test_terngrad_has_the_exact_variance():
    x = X.astype(float)
    exact = np.abs(x).max() * np.abs(x).sum() / (x @ x) - 1
    decoded = draws(ef.TernGrad(bucket=D))
    assert relative_variance(decoded) == pytest.approx(exact, rel=0.03)
    assert exact == pytest.approx(1.43, rel=0.35)
    assert np.linalg.norm(decoded.mean(0) - x) < 1.5 * np.sqrt(exact * (x @ x) / COPIES)


def test_terngrad_bound_holds_for_all_and_is_reached():
    rng = np.random.default_rng(5)
    for d in (1, 2, 9, 100, 10_000):
        bound = ef.TernGrad().variance(d)
        worst = np.full(d, 1 / (1 + math.sqrt(d)))
        worst[0] = 1
        assert worst.sum() / (worst @ worst) - 1 == pytest.approx(bound, abs=1e-12)
        for power in (0.1, 1, 3):
            x = np.abs(rng.normal(size=d)) ** power
            assert x.max() * x.sum() / (x @ x) - 1 <= bound + 1e-12
        assert bound <= math.sqrt(d) - 1 + 1e-12


def test_terngrad_with_a_clip_claims_nothing_and_is_biased():
    clipped = ef.TernGrad(clip=1.0, bucket=D)
    assert not clipped.unbiased
    assert clipped.variance(D) is clipped.contraction(D) is None
    assert ef.TernGrad().unbiased
    mean = draws(clipped).mean(0)
    deviation = np.sqrt(np.mean(X.astype(float) ** 2))
    np.testing.assert_allclose(mean, np.clip(X, -deviation, deviation), atol=0.08)
    assert np.array_equal(ef.TernGrad(clip=9.0).compress(np.ones(5)).decompress(), np.ones(5))


def test_terngrad_digits_by_hand():
    x = np.float32([1, -1, 0, 1, -1, 0, -1])
    payload = ef.TernGrad().compress(x, KEY)
    assert payload.data[16 + 8 :].tolist() == [1 + 2 * 3 + 0 * 9 + 1 * 27 + 2 * 81, 0 + 2 * 3]
    assert np.array_equal(payload.decompress(), x)


# Natural compression and dithering


def test_natural_is_unbiased_with_a_variance_of_at_most_an_eighth():
    x = X.astype(float)
    power = 2.0 ** np.floor(np.log2(np.abs(x)))
    exact = float(((np.abs(x) - power) * (2 * power - np.abs(x))).sum() / (x @ x))
    many = np.tile(X, COPIES)
    decoded = ef.Natural().compress(many, KEY).decompress().reshape(COPIES, D).astype(float)
    assert relative_variance(decoded) == pytest.approx(exact, rel=0.03)
    assert exact == pytest.approx(0.093, rel=0.15)
    assert np.linalg.norm(decoded.mean(0) - x) < 1.5 * np.sqrt(exact * (x @ x) / COPIES)
    worst = ef.Natural().compress(np.full(10**6, 4 / 3, np.float32), KEY).decompress()
    found = float(((worst - 4 / 3) ** 2).mean() / (4 / 3) ** 2)
    assert found == pytest.approx(1 / 8, rel=0.01)


@pytest.mark.parametrize(
    "compressor", [ef.Natural(), ef.TruncateMantissa(0), ef.TruncateMantissa(5)], ids=repr
)
def test_powers_of_two_and_zeros_stay_what_they_are(compressor):
    """From the smallest denormal to 2**127; a reference sends only 2**-108 to 2**18."""
    powers = np.array([2.0**e for e in range(-149, 128)], np.float32)
    for x in (powers[:80], powers[30:], np.float32([0, -0.0, 0])):
        signed = x * np.where(np.arange(x.size) % 2, -1, 1).astype(np.float32)
        kept = np.abs(x) >= 2.0**-126 if np.abs(x).max() >= 2.0**-62 else np.ones(x.size, bool)
        decoded = compressor.compress(signed, KEY).decompress()
        assert np.array_equal(decoded[kept], signed[kept])
        assert np.abs(decoded[~kept]).max(initial=0) <= 2.0**-126


def test_natural_keeps_denormals_in_the_mean_and_the_largest_finite():
    x = np.full(10**6, 1e-39, np.float32)
    x[0] = 1.0
    mean = ef.Natural().compress(x, KEY).decompress()[1:].mean(dtype=np.float64)
    assert mean == pytest.approx(1e-39, rel=0.02)
    alone = ef.Natural().compress(x[1:], KEY).decompress().astype(float)
    assert alone.mean() == pytest.approx(1e-39, rel=0.002)
    assert set(np.log2(alone)) == {-130.0, -129.0}
    largest = ef.Natural().compress(np.full(99, LARGEST), KEY).decompress()
    assert np.array_equal(largest, np.full(99, np.float32(2.0**127)))


@pytest.mark.parametrize(
    ("s", "norm", "found"),
    [(2, 2, 4.64), (4, 2, 0.54), (8, 2, 0.0908), (2, math.inf, 0.39), (4, math.inf, 0.087)],
)
def test_dithering_rounds_to_its_levels(s, norm, found):
    """A reference computes the levels and then returns x: its loss would be 0."""
    dithering = ef.NaturalDithering(s, norm=norm, bucket=D)
    x, decoded = X.astype(float), draws(dithering)
    levels = np.array([0, *(2.0 ** np.arange(1 - s, 1))])
    size = np.linalg.norm(x, norm)
    exact = rounding_variance(np.abs(x) / size, levels) * size**2 / (x @ x)
    assert relative_variance(decoded) == pytest.approx(exact, rel=0.05)
    assert exact == pytest.approx(found, rel=0.25 if norm == 2 else 0.5)  # of another x
    a = math.sqrt(D) * 2.0 ** (1 - s)
    assert exact <= dithering.variance(D) == 1 / 8 + a * min(1, a)
    assert np.linalg.norm(decoded.mean(0) - x) < 1.5 * np.sqrt(exact * (x @ x) / COPIES)
    np.testing.assert_allclose(
        np.unique(np.abs(decoded)), levels[: len(np.unique(np.abs(decoded)))] * size, rtol=1e-6
    )


@pytest.mark.parametrize("compressor", [ef.QSGD(64), ef.NaturalDithering(30), ef.TernGrad()])
def test_draws_do_not_depend_on_a_power_of_two(compressor):
    small = compressor.compress(X, KEY).decompress()
    large = compressor.compress(X * np.float32(2.0**60), KEY).decompress()
    assert np.array_equal(large, small * np.float32(2.0**60))


def test_levels_that_would_overflow_are_left_out():
    x = np.full(9, LARGEST)
    for compressor in (ef.QSGD(5), ef.QSGD(100), ef.NaturalDithering(9), ef.TernGrad()):
        decoded = compressor.compress(x, KEY).decompress()
        assert np.all(np.isfinite(decoded))
        assert np.all(decoded >= 0.49 * LARGEST)
    with pytest.raises(ef.NonFiniteError):  # the norm itself has no float32
        ef.QSGD(2).compress(x, KEY)
    scales = np.float32([0, 1e-45, 1, LARGEST])
    assert Grid("uniform", 7).limits(scales).tolist() == [0, 7, 7, 1]
    assert Grid("powers", 127).limits(scales).tolist() == [0, 2.0**126, 2.0**126, 1]


# Truncation


@pytest.mark.parametrize(("m", "worst"), [(1, 0.330), (3, 0.111), (7, 0.0071), (10, 0.00087)])
def test_truncation_loses_less_than_it_says(m, worst):
    x = np.random.default_rng(6).normal(size=100_000).astype(np.float32)
    decoded = ef.TruncateMantissa(m).compress(x).decompress()
    relative = np.abs((x.astype(float) - decoded) / x)
    assert relative.max() < 1 / (2**m + 1) < 2.0**-m
    assert relative.max() == pytest.approx(worst, rel=0.15)
    assert np.all(np.abs(decoded) <= np.abs(x))
    assert np.array_equal(np.signbit(decoded), np.signbit(x))
    mask = np.uint32(0xFFFFFFFF << (23 - m) & 0xFFFFFFFF)
    assert np.array_equal(decoded.view(np.uint32), x.view(np.uint32) & mask)
    assert ef.TruncateMantissa(m).contraction(1) >= 1 - 4.0**-m


def test_truncation_of_denormals_alone_is_as_good():
    x = (np.random.default_rng(7).integers(1, 2**23, 1000) * 2.0**-149).astype(np.float32)
    decoded = ef.TruncateMantissa(4).compress(x).decompress().astype(float)
    assert (np.abs(x - decoded) / x.astype(float)).max() < 1 / 17


# Random bits and codes


def test_random_words_are_those_of_keys():
    golden = 0x9E3779B97F4A7C15
    for seed in (0, 5, 2**64 - 1):
        expected = [keys._mix((seed + (j + 1) * golden) % 2**64) for j in range(9)]
        assert host.random_words(seed, 9).tolist() == expected


def test_random_bits_of_an_entry_do_not_depend_on_where_a_chunk_starts():
    x = np.full(3 * 5120, 0.3, np.float32)
    scales = np.ones(1, np.float32)
    grid, seed = Grid("uniform", 1), 12345
    codes = host.quantize(x, scales, x.size, grid, seed, subtract=False)
    bits = np.unpackbits(codes, bitorder="little").reshape(-1, 2)[:, 0]
    halves = host.random_words(seed, x.size // 2).view(np.uint32)
    assert np.array_equal(bits, (halves >> 8) * 2.0**-24 < np.float32(0.3))
    assert bits.mean() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 7, 8, 100, 127, 128, 32767])
def test_codes_stand_side_by_side(levels):
    grid = Grid("uniform", levels)
    assert grid.width == 1 + math.ceil(math.log2(levels + 1))
    rng = np.random.default_rng(levels)
    x = rng.integers(-levels, levels + 1, 77).astype(np.float32)
    codes = host.quantize(x, np.ones(1, np.float32), 77, grid, 1, subtract=False)
    stream = int.from_bytes(codes.tobytes(), "little")
    found = [(stream >> (i * grid.width)) & ((1 << grid.width) - 1) for i in range(77)]
    assert found == [int(abs(v)) | ((v < 0) << (grid.width - 1)) for v in x]
    assert stream >> (77 * grid.width) == 0
    assert host.largest_code(codes, grid.width, 77, (1 << grid.width - 1) - 1) == np.abs(x).max()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ef.TruncateMantissa(23), "bits=23, expected a whole number from 0 to 22"),
        (lambda: ef.QSGD(0), "levels=0"),
        (lambda: ef.QSGD(2**15), "levels=32768"),
        (lambda: ef.QSGD(4, bucket=0), "bucket=0"),
        (lambda: ef.TernGrad(clip=0), "clip=0, expected a number of standard deviations in"),
        (lambda: ef.TernGrad(bucket=2**31), "bucket=2147483648"),
        (lambda: ef.NaturalDithering(128), "levels=128"),
        (lambda: ef.NaturalDithering(4, norm=1), "norm=1, expected .*; 2 and math.inf are the two"),
        (lambda: ef.RandomBlock(0), "ratio=0"),
        (lambda: ef.RandomBlock(0.1, block=0), "block=0"),
        (lambda: ef.RandomBlock(0.1, scale="no"), "scale='no'"),
        (lambda: ef.OneBit("l3"), "scale='l3', expected one of"),
        (lambda: ef.OneBit(block=0), "block=0"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
