"""The code of index sets: there and back, golden bytes, sizes, and what a reader refuses.

Everything is tried with the host's kernels and with the ops of a torch device, on CPU tensors.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ef_horovod as ef
import ef_horovod.arrays.numpy as host
import ef_horovod.arrays.torch as device
from ef_horovod.arrays import torch_device, torch_indices
from ef_horovod.arrays.numpy_indices import indices_nbytes, low_bits

TRIANGULAR = np.arange(180) * np.arange(1, 181) // 2
# A change here needs a new version in the header.
GOLDEN = (
    "403018ca5371647b0bce96e248b6fad2d9536cf1e9d61cc1503cd9da5f327477c8de92a358b2bbe2d5107cfd"
    "aae6188260389aea5bf3447389ee9e6068be78f2d1d14cf96bf6144370345bfa57b0547f4afe9a2178ba39c2"
    "dd925cf528c61000403018ca5371647b0bce96e248b6fad2d9536cf1e9d61cc1503cd9da5f327477c8de92a3"
    "58b2bbfff7bddb6ddb5a6bb5aa55555555aa4a954aa5524a2925a5a424254949922449922449924892481249"
    "249248241289442422118988440000000000000000"
)


def vector(d):
    """float32[d] that takes no memory: only its length counts."""
    return np.broadcast_to(np.float32(0), (d,))


def tensor(d):
    return torch.zeros(1).expand(d)


def encode(indices, d):
    """The code, which both ways agree about."""
    code = host.encode_indices(vector(d), indices)
    there = device.encode_indices.on_device(tensor(d), torch.from_numpy(indices))
    assert (there.dtype, bytes(there)) == (code.dtype, bytes(code))
    return code


def decode(code, k, d):
    """The indices, or the PayloadError, which both ways agree about."""
    found = []
    for read, x in (
        (host.decode_indices, vector(d)),
        (device.decode_indices.on_device, tensor(d)),
    ):
        try:
            found.append(np.asarray(read(x, code, k)))
        except ef.PayloadError as error:
            found.append(error)
    if all(isinstance(each, np.ndarray) for each in found):
        assert found[0].dtype == found[1].dtype == np.int64
        np.testing.assert_array_equal(*found)
        return found[0]
    assert repr(found[0]) == repr(found[1])
    raise found[0]


def entropy(k, d):
    """log2 of the number of sets of k indices below d."""
    log_choices = math.lgamma(d + 1) - math.lgamma(k + 1) - math.lgamma(d - k + 1)
    return log_choices / math.log(2)


def there_and_back(indices, d):
    indices = np.array(indices, np.int64)
    code = encode(indices, d)
    assert (code.dtype, code.size) == (np.uint8, indices_nbytes(indices.size, d))
    np.testing.assert_array_equal(decode(code, indices.size, d), indices)
    return code


index_sets = st.integers(1, 3000).flatmap(
    lambda d: st.tuples(st.just(d), st.sets(st.integers(0, d - 1)))
)


@given(index_sets)
def test_any_set_goes_there_and_back(case):
    d, chosen = case
    there_and_back(sorted(chosen), d)


@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(0, 40), st.integers(0, 3)), min_size=1),
    st.integers(0, 10**5),
)
def test_clustered_sets_go_there_and_back(runs, behind):
    """Runs of equal gaps, with spare room behind the last."""
    gaps = np.concatenate([np.full(n, gap * 10**scale) for n, gap, scale in runs])
    indices = np.cumsum(gaps + 1) - 1
    there_and_back(indices, int(indices[-1]) + 1 + behind)


@pytest.mark.parametrize("d", [1, 2, 1000, 2**16, 2**31 - 1])
def test_both_ends_are_reached(d):
    for indices in ([], [0], [d - 1], sorted({0, d // 2, d - 1})):
        there_and_back(indices, d)


@pytest.mark.parametrize("d", [1000, 10**5, 2**31 - 1])
@pytest.mark.parametrize("density", [1e-3, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 1.0])
def test_sets_of_every_density_at_either_end_fit(d, density):
    k = min(max(int(density * d), 1), 50_000)
    there_and_back(np.arange(k), d)
    there_and_back(np.arange(d - k, d), d)


def read_by_the_book(code, k, d):
    """docs/wire-format.md word by word."""

    def total(bits):
        return k * bits + k + (d - 1) // 2**bits

    bits = min(range(32), key=total)
    low_bytes = math.ceil(k * bits / 8)
    assert code.size == low_bytes + math.ceil((k + (d - 1) // 2**bits) / 8)
    low = int.from_bytes(code[:low_bytes].tobytes(), "little")
    high = int.from_bytes(code[low_bytes:].tobytes(), "little")
    places = [place for place in range(high.bit_length()) if high >> place & 1]
    return [(place - i) * 2**bits + (low >> (i * bits)) % 2**bits for i, place in enumerate(places)]


@pytest.mark.parametrize(
    ("k", "d"),
    [(1, 2**31 - 1), (180, 20_000), (2000, 10**6), (300, 1000), (500, 1000), (995, 1000)],
)
def test_the_code_is_what_the_documentation_says(k, d):
    indices = np.sort(np.random.default_rng(k).choice(d, k, replace=False))
    assert read_by_the_book(encode(indices, d), k, d) == indices.tolist()


def test_golden_code():
    assert there_and_back(TRIANGULAR, 20_000).tobytes().hex() == GOLDEN
    sent = np.frombuffer(bytes.fromhex(GOLDEN), np.uint8)
    assert read_by_the_book(sent, 180, 20_000) == TRIANGULAR.tolist()


def test_a_code_by_hand():
    """The example of docs/wire-format.md."""
    assert low_bits(6, 16) == 1
    code = encode(np.array([2, 3, 5, 7, 11, 13]), 16)
    assert code.tobytes() == bytes([0b111110, 0b01010110, 0b1010])


def test_a_code_may_lie_anywhere_in_a_message():
    code = encode(TRIANGULAR, 20_000)
    for start in range(8):
        message = np.concatenate([np.zeros(start, np.uint8), code])[start:]
        message.flags.writeable = False
        np.testing.assert_array_equal(decode(message, 180, 20_000), TRIANGULAR)


@pytest.mark.parametrize("d", [10**5, 10**6, 25 * 10**6, 2**31 - 1])
def test_sizes_are_close_to_the_entropy(d):
    for density in np.geomspace(0.001, 0.1, 300):
        k = int(density * d)
        over = 8 * indices_nbytes(k, d) - entropy(k, d)
        assert 0 < over < 0.67 * k + 14, (k, d)  # two parts of whole bytes


def test_sizes_in_the_documentation():
    d, shown = 25 * 10**6, []
    for density in (0.001, 0.003, 0.01, 0.03, 0.1, 0.5):
        k = int(density * d)
        shown.append((round(entropy(k, d) / k, 2), round(8 * indices_nbytes(k, d) / k, 2)))
    assert np.transpose(shown).tolist() == [
        [11.41, 9.82, 8.08, 6.48, 4.69, 2.00],
        [11.95, 10.30, 8.56, 7.04, 5.25, 3.00],
    ]


def test_sizes_by_hand():
    assert indices_nbytes(0, 0) == indices_nbytes(0, 100) == 0
    assert indices_nbytes(20, 20) == 5  # without low bits: 20 + 19 bits
    assert indices_nbytes(6, 16) == 1 + 2  # 6 x 1 bit, 6 + 7 bits
    # 250,000 x 6 low bits, 250,000 + 390,624 bits
    assert indices_nbytes(250_000, 25_000_000) == 187_500 + 80_078


@pytest.mark.parametrize(("k", "d"), [(1, 1), (5, 9), (50, 60), (180, 20_000), (900, 1000)])
def test_damage_is_refused_or_gives_the_set_that_has_this_code(k, d):
    rng = np.random.default_rng(k)
    code = encode(np.sort(rng.choice(d, k, replace=False)), d)
    refused = 0
    for _ in range(1000):
        damaged = code.copy()
        damaged[rng.integers(code.size)] ^= 1 << rng.integers(8)
        try:
            decoded = decode(damaged, k, d)
        except ef.PayloadError:
            refused += 1
            continue
        assert (decoded.size, decoded[0] >= 0, decoded[-1] < d) == (k, True, True)
        assert np.all(np.diff(decoded) > 0)
        assert bytes(encode(decoded, d)) == bytes(damaged)
    assert refused > 100


@settings(max_examples=300)
@given(st.data())
def test_random_bytes_are_refused_or_give_the_set_that_has_this_code(data):
    d = data.draw(st.sampled_from([1, 40, 1000, 10**6, 2**31 - 1]))
    k = data.draw(st.integers(1, min(d, 200)))
    size = indices_nbytes(k, d)
    code = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8)
    try:
        decoded = decode(code, k, d)
    except ef.PayloadError:
        return
    assert decoded[-1] < d
    assert bytes(encode(decoded, d)) == bytes(code)


@pytest.mark.parametrize(
    ("place", "byte", "good"),
    [
        (2, 0b101010, 7),  # one more set bit of a high part
        (2, 0b10, 5),  # one fewer
        (slice(1, 3), (0b11111111, 0), 2),  # 0, 1 and then 1: does not ascend
        (0, 0b1111110, 7),  # a bit behind the low bits
        (2, 0b10000010, 5),  # a high part of 10: the last index is 21
    ],
)
def test_codes_that_cannot_be_are_refused(place, byte, good):
    damaged = encode(np.array([2, 3, 5, 7, 11, 13]), 16)
    damaged[place] = byte
    with pytest.raises(
        ef.PayloadError,
        match=f"holds {good} good indices, expected 6 ascending ones below 16; it was damaged",
    ):
        decode(damaged, 6, 16)


def test_codes_of_another_length_are_refused():
    code = encode(TRIANGULAR, 20_000)
    for other in (code[:0], code[:-1], code[:-4], np.append(code, np.uint8(0))):
        with pytest.raises(ef.PayloadError, match=f"has {other.size} bytes, expected {code.size}"):
            decode(other, 180, 20_000)
    with pytest.raises(ef.PayloadError, match="has 1 bytes, expected 0"):
        decode(np.zeros(1, np.uint8), 0, 20_000)


def test_a_set_whose_last_index_is_out_of_bounds_is_refused():
    assert indices_nbytes(10_000, 20_000) == indices_nbytes(10_000, 19_998)
    code = encode(np.arange(0, 20_000, 2), 20_000)
    with pytest.raises(ef.PayloadError, match="holds 9999 good indices, expected 10000"):
        decode(code, 10_000, 19_998)


def test_indices_found_on_a_device_stay_there():
    """Only code bytes and values are copied to the host."""
    x = torch.tensor([1.0, -5.0, 2.0, 4.0])
    for found, _ in (device.top_k.on_device(x, 2), device.at_least.on_device(x, 3.0)):
        assert isinstance(found, torch.Tensor)
        assert (found.dtype, found.tolist()) == (torch.int64, [1, 3])
        code = device.encode_indices.on_device(x, found)
        assert isinstance(code, np.ndarray)
        back = device.decode_indices.on_device(x, code, 2)
        assert isinstance(back, torch.Tensor)
        device.scatter_add.on_device(x, back, np.float32([10, 20]), 1.0)
        assert device.take.on_device(x, back).tolist() == [5, 24]
        device.scatter_put.on_device(x, back, np.float32([-5, 4]))
        assert x.tolist() == [1, -5, 2, 4]


@pytest.mark.parametrize(
    "compressor",
    [ef.TopK(0.01), ef.HardThreshold(2.0), ef.Then(ef.TopK(0.01), ef.Natural())],
    ids=repr,
)
def test_no_indices_cross_between_host_and_device(compressor, monkeypatch):
    """With the ops of a device: payload, rest and sum are those of NumPy."""
    crossed = []

    def noting(copy):
        return lambda x, *args: crossed.append(str(x.dtype)) or copy(x, *args)

    for module in (device, torch_indices, torch_device):
        for name in ("to_host", "from_host"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, noting(getattr(torch_device, name)))
    for name, op in list(vars(device).items()):
        monkeypatch.setattr(device, name, getattr(op, "on_device", op))
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    expected, rest = compressor.compress_with_residual(x.copy())
    payload, own_rest = compressor.compress_with_residual(torch.from_numpy(x.copy()))
    assert bytes(payload) == bytes(expected)
    assert own_rest.numpy().tobytes() == rest.tobytes()
    assert payload.decompress().numpy().tobytes() == expected.decompress().tobytes()
    assert set(crossed) == {"torch.float32", "float32", "torch.uint8", "uint8"}
