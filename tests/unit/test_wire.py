"""The wire format: golden bytes, and what a reader refuses; see test_index_code.py as well."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest

import ef_horovod as ef
from ef_horovod import wire
from ef_horovod.compressors.registry import COMPRESSORS

X = np.array([1.0, -2.0, 3.0, -4.0, 0.0, 0.5, -0.25, 8.0, 1.0], np.float32)
KEY = ef.Key(seed=1, step=2, tensor=3, rank=4)
# A change here needs a new version in the header.
GOLDEN = {
    ef.Identity(): "ef020100 24000000 0900000000000000 0000803f 000000c0 00004040 000080c0 00000000"
    " 0000003f 000080be 00000041 0000803f",
    ef.Cast("float16"): "ef020200 16000000 0900000000000000 16000000"
    " 0068 00ec 006e 00f0 0000 0064 00e0 0074 0068",
    ef.Cast("bfloat16"): "ef020200 16000000 0900000000000000 17000000"
    " 0045 80c5 c045 00c6 0000 8044 00c4 8046 0045",
    ef.TopK(k=3): "ef020300 12000000 0900000000000000 03000000 0626 00004040 000080c0 00000041",
    ef.RandomK(0.3): "ef020400 18000000 0900000000000000 c5aafeec074c4d21 02000000 00000000"
    " 00004040 000080c0",
    ef.RandomK(0.3, shared=False): "ef020400 18000000 0900000000000000 31c81a6a9be7c663 02000000"
    " 00000000 00000000 0000803f",
    ef.OneBit(): "ef020500 06000000 0900000000000000 c7710c40 b501",
    ef.OneBit("l2"): "ef020500 06000000 0900000000000000 f9455040 b501",
    ef.OneBit(block=4): "ef020c00 16000000 0900000000000000 04000000 01000000"
    " 00002040 00000c40 0000803f b501",
    ef.OneBit("two_means"): "ef020c00 12000000 0900000000000000 00000000 02000000"
    " 00001040 55550540 b501",
    ef.TruncateMantissa(
        2
    ): "ef020600 15000000 0900000000000000 00000000 02000000 fc01b080080c00fcd01741fc01",
    ef.QSGD(3, bucket=4): "ef020700 18000000 0900000000000000 03000000 04000000"
    " e9b1e93f 35152b40 abaaaa3e a90c7003",
    ef.TernGrad(bucket=8): "ef020800 0e000000 0900000000000000 08000000 00000041 0000803f 3724",
    ef.Natural(): "ef020900 0f000000 0900000000000000 00000000 7f00030a0cc04f5f417f00",
    ef.NaturalDithering(3, bucket=4): "ef020a00 18000000 0900000000000000 03000000 04000000"
    " 6f45af3f e84f0040 0000803e a90c7003",
    ef.HardThreshold(
        3.0
    ): "ef020d00 12000000 0900000000000000 03000000 0626 00004040 000080c0 00000041",
    ef.RandomSparsify(0.4): "ef020e00 14000000 0900000000000000 c5aafeec074c4d21 9a9999999999d93f"
    " 00004040",
    ef.RandomSparsify(0.4, shared=False, scale="unbiased"): "ef020e00 28000000 0900000000000000"
    " 31c81a6a9be7c663 9a9999999999d93f 0000a0c0 00000000 0000a03f 000020bf 0000a041 00002040",
    ef.Then(ef.TopK(k=3), ef.Natural()): "ef020f00 12000000 0900000000000000 03090000"
    " 03000000 0626 00000000 81020b02",
    ef.Then(ef.RandomK(0.3), ef.Cast("bfloat16")): "ef020f00 1c000000 0900000000000000 04020000"
    " c5aafeec074c4d21 02000000 00000000 19000000 4046 80c6",
    ef.Scaled(ef.TernGrad(bucket=8)): "ef021000 16000000 0900000000000000 84bc053f 08000000"
    " 08000000 00000041 0000803f 3724",
    ef.RandomBlock(0.4, block=2): "ef020b00 1c000000 0900000000000000 c5aafeec074c4d21 03000000"
    " 02000000 000080be 00000041 0000003f",
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
    own = {name for name, cls in COMPRESSORS.items() if cls.__module__.startswith("ef_")}
    assert own == {type(compressor).__name__ for compressor in GOLDEN}


def test_golden_numbers_by_hand():
    """Top-3 of X is 3 at index 2, -4 at 3, 8 at 7; with 9 elements one low bit is the cheapest."""
    payload = ef.Payload.from_bytes(bytes.fromhex(GOLDEN[ef.TopK(k=3)].replace(" ", "")))
    np.testing.assert_array_equal(payload.decompress(), [0, 0, 3, -4, 0, 0, 0, 8, 0])
    # low bits 0, 1, 1 from the right; high parts 1, 1, 3 set bits 1 + 0, 1 + 1 and 3 + 2
    assert payload.data[20:22].tobytes() == bytes([0b110, 0b100110])


def test_golden_skip():
    assert bytes(ef.OneBit().skip(X)).hex() == "ef020501060000000900000000000000" + "00" * 6


def test_header():
    header = wire.Header(kind=3, flags=1, body_nbytes=0x01020304, num_elements=0x7FFFFFFF)
    packed = header.pack()
    assert packed.tobytes().hex() == "ef02030104030201ffffff7f00000000"
    assert len(packed) == wire.HEADER_NBYTES == 16
    body = np.zeros(3, np.uint8)
    small = wire.Header(7, 0, 3, 10)
    assert wire.read_header(np.concatenate([small.pack(), body, body])) == small


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 0xEE, "magic 0xee and version 2, expected 0xef and 2; install the same ef_horovod"),
        (1, 1, "magic 0xef and version 1, expected 0xef and 2; install the same ef_horovod"),
        (1, 3, "version 3"),
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
        (6, struct.pack("<II", 1, 2) + bytes(5), "shift 1 or a number that is not finite"),
        (6, struct.pack("<II", 0, 2) + b"\xff" * 5, "a number that is not finite"),
        (6, struct.pack("<II", 0, 23) + bytes(12), "23 bits of mantissa, expected at most 22"),
        (7, struct.pack("<IIf", 2, 0, 1) + b"\x03\0", "no number, expected levels up to 2"),
        (7, struct.pack("<IIf", 0, 0, 1) + bytes(1), "0 levels, expected 1 to 32767"),
        (7, struct.pack("<IIf", 2, 2**31, 1) + bytes(2), "blocks of 2147483648 entries"),
        (7, struct.pack("<IIf", 2, 0, math.nan) + bytes(2), "a scale that is below 0 or not"),
        (8, struct.pack("<If", 0, -1) + bytes(1), "a scale that is below 0 or not finite"),
        (8, struct.pack("<If", 0, 1) + b"\xf3", "a code that stands for no number"),
        (9, struct.pack("<I", 87) + b"\xff" * 4, "a number that is not finite"),
        (10, struct.pack("<IIf", 128, 0, 1) + bytes(4), "128 levels, expected 1 to 127"),
        (10, struct.pack("<IIf", 4, 0, 1) + b"\x05\0", "no number, expected levels up to 4"),
        (11, struct.pack("<QII", 1, 4, 1) + bytes(4 * 4), "4 values in runs of 1, expected at mo"),
        (11, struct.pack("<QII", 1, 2, 0) + bytes(4 * 2), "2 values in runs of 0"),
        (12, struct.pack("<IIf", 0, 3, 1) + bytes(9), "3 scales for a block, expected 1 or 2"),
        (12, struct.pack("<IIf", 0, 1, math.inf) + bytes(1), "a scale that is below 0 or not"),
        (14, struct.pack("<Qd", 1, 0.0), "p=0.0, expected a probability"),
        (14, struct.pack("<Qd", 1, -0.5), "p=-0.5, expected a probability"),
        (14, struct.pack("<Qd", 1, math.nan), "p=nan, expected a probability"),
        (14, struct.pack("<Qd", 1, 1.0) + bytes(8), "keeps more than 2 of 3 entries"),
        (14, struct.pack("<Qd", 1, 1.0) + bytes(16), "has 32 bytes, expected 28"),
        (15, struct.pack("<BBH", 9, 3, 0), "kinds 9 and 3 with a reserved word of 0, expected a"),
        (15, struct.pack("<BBH", 3, 3, 0) + bytes(4), "of kinds 3 and 3"),
        (15, struct.pack("<BBH", 3, 15, 0) + bytes(4), "of kinds 3 and 15"),
        (15, struct.pack("<BBH", 15, 9, 0) + bytes(4), "of kinds 15 and 9"),
        (15, struct.pack("<BBH", 3, 99, 0) + bytes(8), "of kinds 3 and 99"),
        (15, struct.pack("<BBH", 3, 9, 1) + bytes(8), "a reserved word of 1"),
        (15, struct.pack("<BBHI", 3, 9, 0, 4) + bytes(8), "4 entries, expected at most 3"),
        (15, struct.pack("<BBHI", 3, 9, 0, 0) + bytes(5), "Natural payload has 5 bytes, expected"),
        (15, struct.pack("<BBHII", 3, 9, 0, 0, 7), "shift 7 or a number that is not finite"),
        (16, struct.pack("<fBBH", 0.0, 9, 0, 0) + bytes(8), "scale 0.0, kind 9"),
        (16, struct.pack("<fBBH", 1.5, 9, 0, 0) + bytes(8), "scale 1.5, kind 9"),
        (16, struct.pack("<fBBH", math.nan, 9, 0, 0) + bytes(8), "scale nan, kind 9"),
        (16, struct.pack("<fBBH", 0.5, 16, 0, 0) + bytes(8), "scale 0.5, kind 16"),
        (16, struct.pack("<fBBH", 0.5, 15, 0, 0) + bytes(8), "scale 0.5, kind 15"),
        (16, struct.pack("<fBBH", 0.5, 9, 1, 0) + bytes(8), r"reserved words of \[1, 0\]"),
        (16, struct.pack("<fBBHI", 0.5, 9, 0, 0, 0) + b"\xff" * 4, "a number that is not finite"),
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
