"""The wire format: golden bytes, the code of index sets, and what a reader refuses."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ef_horovod as ef
from ef_horovod import registry, wire

X = np.array([1.0, -2.0, 3.0, -4.0, 0.0, 0.5, -0.25, 8.0, 1.0], np.float32)
KEY = ef.Key(seed=1, step=2, tensor=3, rank=4)
# Bytes that were once sent must be read for ever: a change here needs a new version in the header.
GOLDEN = {
    ef.Identity(): "ef010100 24000000 0900000000000000 0000803f 000000c0 00004040 000080c0 00000000"
    " 0000003f 000080be 00000041 0000803f",
    ef.Cast("float16"): "ef010200 16000000 0900000000000000 16000000"
    " 0068 00ec 006e 00f0 0000 0064 00e0 0074 0068",
    ef.Cast("bfloat16"): "ef010200 16000000 0900000000000000 17000000"
    " 0045 80c5 c045 00c6 0000 8044 00c4 8046 0045",
    ef.TopK(k=3): "ef010300 12000000 0900000000000000 03000000 0626 00004040 000080c0 00000041",
    ef.RandomK(0.3): "ef010400 18000000 0900000000000000 c5aafeec074c4d21 02000000 00000000"
    " 00004040 000080c0",
    ef.RandomK(0.3, shared=False): "ef010400 18000000 0900000000000000 31c81a6a9be7c663 02000000"
    " 00000000 00000000 0000803f",
    ef.OneBit(): "ef010500 06000000 0900000000000000 c7710c40 b501",
}


@pytest.mark.parametrize("compressor", GOLDEN, ids=repr)
def test_golden_bytes(compressor):
    assert bytes(compressor.compress(X, KEY)).hex() == GOLDEN[compressor].replace(" ", "")


@pytest.mark.parametrize("compressor", GOLDEN, ids=repr)
def test_golden_bytes_are_read(compressor):
    sent = bytes.fromhex(GOLDEN[compressor].replace(" ", ""))
    expected = compressor.compress(X, KEY).decompress()
    np.testing.assert_array_equal(ef.Payload.from_bytes(sent).decompress(), expected)


def test_every_registered_compressor_has_golden_bytes():
    own = {name for name, cls in registry.COMPRESSORS.items() if cls.__module__.startswith("ef_")}
    assert own == {type(compressor).__name__ for compressor in GOLDEN}


def test_golden_numbers_by_hand():
    """Top-3 of X is 3 at index 2, -4 at 3, 8 at 7; with 9 elements one low bit is the cheapest."""
    payload = ef.Payload.from_bytes(bytes.fromhex(GOLDEN[ef.TopK(k=3)].replace(" ", "")))
    np.testing.assert_array_equal(payload.decompress(), [0, 0, 3, -4, 0, 0, 0, 8, 0])
    # low bits 0, 1, 1 from the right; high parts 1, 1, 3 set bits 1 + 0, 1 + 1 and 3 + 2
    assert payload.data[20:22].tobytes() == bytes([0b110, 0b100110])


def test_golden_skip():
    assert bytes(ef.OneBit().skip(X)).hex() == "ef010501060000000900000000000000" + "00" * 6


def test_header():
    header = wire.Header(kind=3, flags=1, body_nbytes=0x01020304, num_elements=0x7FFFFFFF)
    packed = header.pack()
    assert packed.tobytes().hex() == "ef01030104030201ffffff7f00000000"
    assert len(packed) == wire.HEADER_NBYTES == 16
    body = np.zeros(3, np.uint8)
    small = wire.Header(7, 0, 3, 10)
    assert wire.read_header(np.concatenate([small.pack(), body, body])) == small


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 0xEE, "magic 0xee and version 1, expected 0xef and 1"),
        (1, 2, "version 2"),
        (4, 37, "announces 37 bytes for 9 elements, but 36 bytes follow"),
        (7, 0x80, "announces"),
        (11, 0x80, "at most 2147483647 elements"),
        (15, 1, "at most 2147483647 elements"),
        (2, 199, "payload of kind 199"),
    ],
)
def test_damaged_header_is_refused(place, value, message):
    sent = bytearray(ef.Identity().compress(X).data)
    sent[place] = value
    with pytest.raises(ef.PayloadError, match=message):
        ef.Payload.from_bytes(sent)


def test_short_header_and_spare_bytes_are_refused():
    sent = bytes(ef.Identity().compress(X))
    with pytest.raises(ef.PayloadError, match="15 bytes, expected at least the 16"):
        ef.Payload.from_bytes(sent[:15])
    with pytest.raises(ef.PayloadError, match="37 bytes of body, expected"):
        ef.Payload.from_bytes(sent + b"\0")


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        (5, struct.pack("<fB", math.inf, 0), "scale inf, expected a finite number"),
        (5, struct.pack("<fB", math.nan, 0), "scale nan"),
        (5, struct.pack("<fB", -1.0, 0), "scale -1.0"),
        (2, struct.pack("<i3H", 164 << 1, 0, 0, 0), "shift 164, expected at most 163"),
        (2, struct.pack("<i3H", -164 << 1, 0, 0, 0), "shift -164"),
        (3, struct.pack("<I", 4) + bytes(4 * 4 + 1), "4 entries, expected at most 3"),
        (4, struct.pack("<QII", 1, 4, 0) + bytes(4 * 4), "4 values and a reserved word"),
        (4, struct.pack("<QII", 1, 2, 9) + bytes(4 * 2), "a reserved word of 9"),
    ],
)
def test_fields_that_cannot_be_are_refused(kind, body, message):
    """Bodies of a fitting length, which only a look at their fields tells apart from good ones."""
    data = wire.Header(kind, 0, len(body), 3).pack().tobytes() + body
    payload, dense = ef.Payload.from_bytes(data), np.ones(3, np.float32)
    with pytest.raises(ef.PayloadError, match=message):
        payload.add_to(dense)
    assert dense.tolist() == [1, 1, 1]


@pytest.mark.parametrize("limit", ["MAX_ELEMENTS", "MAX_NBYTES"])
def test_arrays_too_large_for_one_payload_are_refused(monkeypatch, limit):
    monkeypatch.setattr(wire, limit, 40)
    assert ef.Identity().compress(np.zeros(6)).nbytes == 40
    with pytest.raises(ValueError, match="compress the parts of a larger array one by one"):
        ef.Identity().compress(np.zeros(41))


def test_fields_read_from_left_to_right():
    fields = wire.Fields(np.arange(11, dtype=np.uint8), "Test")
    assert fields.array("u1", 3).tolist() == [0, 1, 2]
    assert fields.array("<u4", 1)[0] == 0x06050403  # not aligned: a copy
    with pytest.raises(ef.PayloadError, match="Test payload has 11 bytes, expected 7"):
        fields.end()
    with pytest.raises(ef.PayloadError, match="expected 8 more at byte 7"):
        fields.array("<f4", 2)
    assert fields.array("<u2", 2).tolist() == [0x0807, 0x0A09]
    fields.end()


index_sets = st.integers(1, 3000).flatmap(
    lambda bound: st.tuples(st.just(bound), st.sets(st.integers(0, bound - 1)))
)


@given(index_sets)
def test_index_code_goes_there_and_back(case):
    bound, chosen = case
    indices = np.array(sorted(chosen), np.int64)
    code = wire.encode_indices(indices, bound)
    assert code.size == wire.indices_nbytes(indices.size, bound)
    np.testing.assert_array_equal(wire.decode_indices(code, indices.size, bound), indices)


@pytest.mark.parametrize("bound", [1, 2, 1000, 2**16, 2**31 - 1])
def test_index_code_reaches_both_ends(bound):
    for indices in ([0], [bound - 1], sorted({0, bound // 2, bound - 1})):
        code = wire.encode_indices(np.array(indices, np.int64), bound)
        assert code.size == wire.indices_nbytes(len(indices), bound)
        assert wire.decode_indices(code, len(indices), bound).tolist() == indices


def test_index_code_by_hand():
    """The example of docs/wire-format.md."""
    code = wire.encode_indices(np.array([2, 3, 5, 7, 11, 13]), 16)
    assert wire.low_bits(6, 16) == 1
    assert code.tobytes() == bytes([0b111110, 0b01010110, 0b1010])


@pytest.mark.parametrize("density", [0.001, 0.003, 0.01, 0.03, 0.1])
@pytest.mark.parametrize("bound", [10**5, 10**6, 25 * 10**6])
def test_index_code_costs_little_over_the_entropy(bound, density):
    k = int(density * bound)
    log_choices = math.lgamma(bound + 1) - math.lgamma(k + 1) - math.lgamma(bound - k + 1)
    entropy = log_choices / math.log(2) / k
    cost = 8 * wire.indices_nbytes(k, bound) / k
    assert entropy < cost < entropy + 0.6 + 16 / k
    if density == 0.01 and bound > 10**6:
        assert (round(cost, 2), round(entropy, 2)) == (8.56, 8.08)


def test_size_formula_by_hand():
    assert wire.indices_nbytes(0, 100) == 0
    assert wire.indices_nbytes(100, 100) == 25  # no low bits: 100 + 99 bits of unary
    assert wire.indices_nbytes(6, 16) == 1 + 2  # 6 x 1 bit, 6 + 7 bits
    assert wire.indices_nbytes(250_000, 25_000_000) == 267_578


@pytest.mark.parametrize(("k", "bound"), [(1, 1), (5, 9), (100, 10_000), (50, 60)])
def test_damaged_index_code_is_refused_or_gives_indices_in_bounds(k, bound):
    rng = np.random.default_rng(k)
    indices = np.sort(rng.choice(bound, k, replace=False))
    code = wire.encode_indices(indices, bound)
    refused = 0
    for _ in range(2000):
        damaged = code.copy()
        damaged[rng.integers(code.size)] = rng.integers(256)
        try:
            decoded = wire.decode_indices(damaged, k, bound)
        except ef.PayloadError:
            refused += 1
            continue
        assert decoded.size == k
        assert decoded[0] >= 0
        assert decoded[-1] < bound
        assert np.all(np.diff(decoded) > 0)
    assert refused > 100


def test_index_code_with_too_many_or_too_few_indices_is_refused():
    code = wire.encode_indices(np.array([2, 3, 5, 7, 11, 13]), 16)
    more, fewer, beyond = code.copy(), code.copy(), code.copy()
    more[2] |= 0b100000
    fewer[2] = 0b10
    beyond[1:] = 0b11111111, 0  # 0, 1 and then 1: does not ascend
    for damaged, good in ((more, 7), (fewer, 5), (beyond, 2)):
        with pytest.raises(ef.PayloadError, match=f"holds {good} good indices, expected 6"):
            wire.decode_indices(damaged, 6, 16)
