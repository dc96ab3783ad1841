"""The length in a payload is believed as far as its bytes go: no memory or time for more."""

from __future__ import annotations

import contextlib
import struct
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ef_horovod as ef
import ef_horovod.arrays.numpy as host
from ef_horovod import wire
from ef_horovod.compressors.registry import COMPRESSORS

MOST = wire.MAX_ELEMENTS
BUILT_IN = [kind for kind in COMPRESSORS.values() if "ef_horovod." in kind.__module__]
EXAMPLES = [example for kind in BUILT_IN for example in kind.examples()]


def _payload(kind: type, body: bytes, d: int, flags: int = 0) -> ef.Payload:
    header = wire.Header(kind.wire_id, flags, len(body), d)
    return ef.Payload.from_bytes(bytes(header.pack()) + body)


def _cost(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and the most bytes that were allocated."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        work()
    finally:
        seconds = time.process_time() - begin
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return seconds, peak


def _refused(payload: ef.Payload) -> None:
    with pytest.raises(ef.PayloadError):
        payload.decompress()


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    for example in EXAMPLES:
        example.compress(np.ones(100, np.float32)).decompress()


@pytest.mark.parametrize("compressor", EXAMPLES, ids=repr)
def test_a_body_that_is_too_short_for_its_length_takes_no_memory(compressor):
    sent = compressor.compress(np.ones(1000, np.float32))
    seedless = not str(type(compressor).__name__).startswith("Random")  # whose places fit any d
    if seedless:
        damaged = _payload(type(compressor), bytes(sent)[16:], MOST)
        _, peak = _cost(lambda: _refused(damaged))
        assert peak < 1 << 20
    with pytest.raises(ef.PayloadError, match="expected 1000 elements"):
        ef.Payload.from_bytes(bytes(_payload(type(compressor), bytes(sent)[16:], MOST)), 1000)
    assert ef.Payload.from_bytes(bytes(sent), 1000).decompress().shape == (1000,)


def _all_places(kind: type) -> tuple[bytes, int]:
    """The head of a body of a sparsifier that keeps all entries, and their number."""
    if issubclass(kind, ef.RandomSparsify):
        return struct.pack("<Qd", 7, 1.0), MOST
    if issubclass(kind, (ef.RandomK, ef.RandomBlock)):
        return struct.pack("<QII", 7, MOST, int(kind is ef.RandomBlock)), MOST
    d = 1 << 20  # whose code takes two bits an index, and the indices 64
    code = host.encode_indices(np.empty(d, np.float32), np.arange(d))
    return struct.pack("<I", d) + code.tobytes(), d


SPARSIFIERS = [ef.TopK, ef.HardThreshold, ef.RandomK, ef.RandomBlock, ef.RandomSparsify]


@pytest.mark.parametrize("kind", SPARSIFIERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("values", [None, *BUILT_IN], ids=lambda v: v and v.__name__)
def test_places_without_values_take_neither_time_nor_memory(kind, values):
    head, d = _all_places(kind)
    body = head + bytes(max(0, 100 - len(head)))
    if values is not None:
        body = struct.pack("<BBH", kind.wire_id, values.wire_id, 0) + body
    damaged = _payload(kind if values is None else ef.Then, body, d)
    seconds, peak = _cost(lambda: _refused(damaged))
    assert peak < (1 << 20) + 4 * len(body)
    assert seconds < 0.5


def test_a_random_sparsifier_that_keeps_almost_nothing_is_quick_too():
    damaged = _payload(ef.RandomSparsify, struct.pack("<Qd", 7, 5e-324) + bytes(4), MOST)
    seconds, peak = _cost(lambda: _refused(damaged))
    assert peak < 1 << 20
    assert seconds < 0.5


def test_a_length_without_memory_for_it_is_a_payload_error(monkeypatch):
    zeros = np.zeros

    def limited(shape, *args, **options):
        if np.prod(shape) > 1 << 20:
            raise MemoryError
        return zeros(shape, *args, **options)

    sent = ef.HardThreshold(1.0).compress(np.zeros(1 << 21, np.float32))
    monkeypatch.setattr(np, "zeros", limited)
    with pytest.raises(ef.PayloadError, match="expected at most as many elements as there is mem"):
        ef.Payload.from_bytes(bytes(sent)).decompress()


def test_a_payload_that_says_to_skip_takes_no_memory():
    skip = _payload(ef.TopK, b"", MOST, wire.SKIP)
    _, peak = _cost(lambda: _refused(skip))
    assert peak < 1 << 20


@pytest.mark.parametrize("flags", [8, 16, 64, 128, 255])
def test_flags_that_nobody_sets_are_refused(flags):
    with pytest.raises(ef.PayloadError, match=f"flags {flags:#04x}, expected"):
        _payload(ef.TopK, b"", 3, flags)


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from(BUILT_IN),
    d=st.integers(0, MOST),
    head=st.lists(st.sampled_from([0, 1, 2, 3, 7, 0x3F, 0x7F, 0xF0, 0xFF]), max_size=40),
    rest=st.binary(max_size=60),
)
def test_no_bytes_make_a_decoder_take_more_than_they_justify(kind, d, head, rest):
    payload = _payload(kind, bytes(head) + rest, d)

    def check() -> None:
        with contextlib.suppress(ef.PayloadError):
            payload.kind.require_body(payload._body, d)

    seconds, peak = _cost(check)
    assert peak < 1 << 20
    assert seconds < 0.5


def test_a_class_with_a_format_of_its_own_does_not_inherit_a_bound():
    class Shorter(ef.Identity):
        @classmethod
        def accumulate(cls, body, dense, weight):
            dense += weight

    assert Shorter.least_nbytes(1000) == 0
    Shorter.require_body(np.zeros(0, np.uint8), 1000)


@pytest.mark.parametrize("compressor", EXAMPLES, ids=repr)
@pytest.mark.parametrize("d", [0, 1, 2, 5, 9, 1000])
def test_the_bound_is_one(compressor, d):
    assert type(compressor).least_nbytes(d) <= compressor.body_nbytes(d)


@pytest.mark.parametrize("share", [0.01, 0.1])
@pytest.mark.parametrize(
    "x",
    [
        np.full(1_000_000, 1.5, np.float32),
        np.zeros(1_000_000, np.float32),
        np.tile(np.array([1, -1, 2, -3], np.float32), 250_000),
        np.full(1_000_000, np.nan, np.float32),
    ],
    ids=["equal", "zeros", "few values", "nan"],
)
def test_top_k_of_equal_numbers_takes_no_more_memory_than_its_results(x, share):
    from ef_horovod.arrays import numpy as xp

    k = int(share * x.size)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    xp.top_k(x[:200_000], 100)  # compiled
    _, peak = _cost(lambda: found.append(xp.top_k(x, k)))
    assert peak < 4 * x.size + 60 * k
    indices, values = found[0]
    expected = np.sort(np.argsort(-np.abs(x), kind="stable")[:k])
    assert np.array_equal(indices, expected)
    assert np.array_equal(values, x[expected], equal_nan=True)


def test_top_k_of_equal_numbers_on_a_device_keeps_the_first_ones(monkeypatch):
    import torch

    from ef_horovod.arrays import torch as xp

    monkeypatch.setattr(xp, "_WORK", 100)
    for x in (torch.ones(1000), torch.tensor([1.0, 2.0, -2.0, 0.0]).repeat(250)):
        indices, values = xp.top_k.on_device(x, 130)
        expected = np.sort(np.argsort(-np.abs(x.numpy()), kind="stable")[:130])
        assert np.array_equal(indices, expected)
        assert np.array_equal(values, x.numpy()[expected])
