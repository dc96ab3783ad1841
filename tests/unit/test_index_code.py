"""The codes of index sets: there and back, golden bytes, sizes, and what a reader refuses."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ef_horovod as ef
from ef_horovod.arrays import kernels_indices
from ef_horovod.wire import index_code

TRIANGULAR = np.arange(180) * np.arange(1, 181) // 2
# Bytes that were once sent must be read for ever: a change here needs a new version in the header.
GOLDEN = (
    "0021436587a9cbed0f21436587a9cbed0f21436587a9cbed0f21436587a9cbed0f21436587a9cbed0f214365"
    "87a9cbed0f21436587a9cbed0f21436587a9cbed0f21436587a9cbed0f21436587a9cbed0f21436587a9cbed"
    "0f210000f371c04b790000001bc11bc5f07188f66ed3561eb034b85eb8d4bd1e7fd6e4caca56629e6f87dc4c"
    "2578693ccab82a33acc812b94ed97cff8ef97d7531aa45ce9d1a7baa4c9be3ea0f9b7feb95eb134f1accaa9b"
    "3d0cc392945cdc89341c6b2b0000000000000000"
)


def entropy(k, bound):
    """log2 of the number of sets of k indices below the bound."""
    log_choices = math.lgamma(bound + 1) - math.lgamma(k + 1) - math.lgamma(bound - k + 1)
    return log_choices / math.log(2)


def gap_code_only():
    """As if Elias-Fano were never shorter."""
    return mock.patch.object(index_code, "_elias_fano_nbytes", return_value=2**40)


def takes_gap_code(k, bound):
    return index_code.indices_nbytes(k, bound) < index_code._elias_fano_nbytes(k, bound)


def there_and_back(indices, bound):
    indices = np.array(indices, np.int64)
    code = index_code.encode_indices(indices, bound)
    assert (code.dtype, code.size) == (np.uint8, index_code.indices_nbytes(indices.size, bound))
    np.testing.assert_array_equal(index_code.decode_indices(code, indices.size, bound), indices)
    return code


index_sets = st.integers(1, 3000).flatmap(
    lambda bound: st.tuples(st.just(bound), st.sets(st.integers(0, bound - 1)))
)


@given(index_sets)
def test_any_set_goes_there_and_back(case):
    bound, chosen = case
    there_and_back(sorted(chosen), bound)
    with gap_code_only():
        there_and_back(sorted(chosen), bound)


@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(0, 40), st.integers(0, 3)), min_size=1),
    st.integers(0, 10**5),
)
def test_clustered_sets_go_there_and_back(runs, behind):
    """Runs of equal gaps, with spare room behind the last: no gap is too rare to fit."""
    gaps = np.concatenate([np.full(n, gap * 10**scale) for n, gap, scale in runs])
    indices = np.cumsum(gaps + 1) - 1
    there_and_back(indices, int(indices[-1]) + 1 + behind)


@pytest.mark.parametrize("bound", [1, 2, 1000, 2**16, 2**31 - 1])
def test_both_ends_are_reached(bound):
    for indices in ([0], [bound - 1], sorted({0, bound // 2, bound - 1})):
        there_and_back(indices, bound)
        with gap_code_only():
            there_and_back(indices, bound)


@pytest.mark.parametrize("bound", [1000, 10**5, 2**31 - 1])
@pytest.mark.parametrize("density", [1e-3, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 1.0])
def test_the_worst_sets_fit(bound, density):
    """A gap takes the most room for what it skips just where its upper part becomes larger."""
    k = min(max(int(density * bound), 1), 50_000)
    with gap_code_only():
        plan = index_code._gap_plan(k, bound)
        for part in range(1, 34):
            gap = part << plan.low_bits
            wide = min((bound - k) // gap, k)
            gaps = np.zeros(k, np.int64)
            gaps[k - wide :] = gap
            for order in (gaps, gaps[::-1]):
                there_and_back(np.cumsum(order + 1) - 1, bound)
        there_and_back(np.arange(bound - k, bound), bound)


def read_by_the_book(code, k, bound):
    """docs/wire-format.md word by word, with floats where it has formulas; also the size."""
    low_bits, u = 0, 1 - k / bound
    while u * u >= 200 / 256:
        u, low_bits = u * u, low_bits + 1
    ratio = max(math.floor(256 * u + 0.5), 1) / 256
    tail = [math.floor(4096 * ratio**j + 0.5) for j in range(17)]
    e = next(e for e in (16, 8, 4, 2, 1) if e == 1 or tail[e] >= 128)
    frequencies = [tail[j] - tail[j + 1] for j in range(e)] + [tail[e]]
    slots = [(j, s) for j in range(e + 1) for s in range(frequencies[j])]
    words = [int(word) for word in code.view("<u4")]
    low_words = -(-k * low_bits // 32)
    low = sum(word << (32 * i) for i, word in enumerate(words[:low_words]))
    state, rest = words[low_words] + (words[low_words + 1] << 32), words[low_words + 2 :]
    c = [12289 - math.floor(1024 * math.log2(f)) for f in frequencies]
    a, total = max(e * c[j] - j * c[e] for j in range(e)), (bound - k) // 2**low_bits
    assert len(rest) == -(-(a * k + c[e] * total) // (1024 * e)) // 32
    indices, index = [], -1
    for i in range(k):
        upper, symbol = 0, e
        while symbol == e:
            symbol, offset = slots[state % 4096]
            state = frequencies[symbol] * (state // 4096) + offset
            if state < 2**31:
                state = (state << 32) + rest.pop(0)
            upper += symbol
        index += 1 + upper * 2**low_bits + (low >> (i * low_bits)) % 2**low_bits
        indices.append(index)
    assert (state, set(rest)) in ((2**31, set()), (2**31, {0}))
    return indices


@pytest.mark.parametrize(
    ("k", "bound"), [(180, 20_000), (2000, 10**6), (300, 1000), (500, 1000), (995, 1000)]
)
def test_gap_code_is_what_the_documentation_says(k, bound):
    assert takes_gap_code(k, bound)
    indices = np.sort(np.random.default_rng(k).choice(bound, k, replace=False))
    code = index_code.encode_indices(indices, bound)
    assert read_by_the_book(code, k, bound) == indices.tolist()


def test_golden_gap_code():
    assert takes_gap_code(180, 20_000)
    assert there_and_back(TRIANGULAR, 20_000).tobytes().hex() == GOLDEN
    sent = np.frombuffer(bytes.fromhex(GOLDEN), np.uint8)
    assert read_by_the_book(sent, 180, 20_000) == TRIANGULAR.tolist()


def test_elias_fano_by_hand():
    """The example of docs/wire-format.md."""
    code = index_code.encode_indices(np.array([2, 3, 5, 7, 11, 13]), 16)
    assert index_code.low_bits(6, 16) == 1
    assert code.tobytes() == bytes([0b111110, 0b01010110, 0b1010])


def test_a_code_may_lie_anywhere_in_a_message():
    code = index_code.encode_indices(TRIANGULAR, 20_000)
    for start in range(4):
        message = np.concatenate([np.zeros(start, np.uint8), code])[start:]
        message.flags.writeable = False
        decoded = index_code.decode_indices(message, 180, 20_000)
        np.testing.assert_array_equal(decoded, TRIANGULAR)


@pytest.mark.parametrize("bound", [10**5, 10**6, 25 * 10**6, 2**31 - 1])
def test_sizes_are_close_to_the_entropy(bound):
    for density in np.geomspace(0.001, 0.1, 300):
        k = int(density * bound)
        if k >= 2000:
            over = 8 * index_code.indices_nbytes(k, bound) / entropy(k, bound)
            assert 1 < over < 1.03, (k, bound)


def test_sizes_in_the_documentation():
    bound, shown = 25 * 10**6, []
    for density in (0.001, 0.003, 0.01, 0.03, 0.1, 0.5):
        k = int(density * bound)
        bits = 8 * index_code.indices_nbytes(k, bound), 8 * index_code._elias_fano_nbytes(k, bound)
        shown.append([round(entropy(k, bound) / k, 2), *(round(b / k, 2) for b in bits)])
    assert np.transpose(shown).tolist() == [
        [11.41, 9.82, 8.08, 6.48, 4.69, 2.00],
        [11.51, 9.98, 8.20, 6.64, 4.78, 2.00],
        [11.95, 10.30, 8.56, 7.04, 5.25, 3.00],
    ]


def test_sizes_by_hand():
    assert index_code.indices_nbytes(0, 100) == 0
    assert index_code.indices_nbytes(20, 20) == 5  # Elias-Fano without low bits: 20 + 19 bits
    assert index_code.indices_nbytes(6, 16) == 1 + 2  # 6 x 1 bit, 6 + 7 bits
    # u = 0.99, squared 4 times 0.851: R = 218, e = 16. 250,000 x 4 low bits; H: see above.
    assert index_code.indices_nbytes(250_000, 25_000_000) == 4 * (31_250 + 32_806)


def test_few_indices_take_elias_fano_and_many_the_gap_code():
    chosen = [takes_gap_code(k, 10**6) for k in range(1, 1000)]
    assert not any(chosen[:99])
    assert all(chosen[219:])


@pytest.mark.parametrize(("k", "bound"), [(1, 1), (5, 9), (50, 60), (180, 20_000), (900, 1000)])
@pytest.mark.parametrize("code_of", ["the shorter code", "gap code"])
def test_damage_is_refused_or_gives_the_set_that_has_this_code(k, bound, code_of):
    rng = np.random.default_rng(k)
    indices = np.sort(rng.choice(bound, k, replace=False))
    refused = 0
    with gap_code_only() if code_of == "gap code" else mock.MagicMock():
        code = index_code.encode_indices(indices, bound)
        for _ in range(1000):
            damaged = code.copy()
            damaged[rng.integers(code.size)] ^= 1 << rng.integers(8)
            try:
                decoded = index_code.decode_indices(damaged, k, bound)
            except ef.PayloadError:
                refused += 1
                continue
            assert (decoded.size, decoded[0] >= 0, decoded[-1] < bound) == (k, True, True)
            assert np.all(np.diff(decoded) > 0)
            assert bytes(index_code.encode_indices(decoded, bound)) == bytes(damaged)
    assert refused > 100


@settings(max_examples=300)
@given(st.data())
def test_random_bytes_are_refused_or_give_the_set_that_has_this_code(data):
    bound = data.draw(st.sampled_from([1, 40, 1000, 10**6, 2**31 - 1]))
    k = data.draw(st.integers(1, min(bound, 200)))
    with gap_code_only():
        size = index_code.indices_nbytes(k, bound)
        code = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8)
        try:
            decoded = index_code.decode_indices(code, k, bound)
        except ef.PayloadError:
            return
        assert decoded[-1] < bound
        assert bytes(index_code.encode_indices(decoded, bound)) == bytes(code)


def with_word(code, place, word):
    """A copy with another word."""
    words = code.copy()
    words.view("<u4")[place] = word
    return words


def test_gap_codes_that_cannot_be_are_refused():
    code = index_code.encode_indices(TRIANGULAR, 20_000)
    plan, words = index_code._gap_plan(180, 20_000), code.view("<u4")
    assert (plan.low_bits * 180) % 32 == 16  # so the last low word is half empty
    assert words[-1] == 0  # and this set leaves room behind
    for place, word, good in [
        (plan.low_words - 1, words[plan.low_words - 1] | 1 << 16, 181),  # beyond the low bits
        (-1, 1, 181),  # beyond the words
        (plan.low_words + 1, 1 << 31, 0),  # a state of 2**63
        (plan.low_words + 1, 0, 0),  # a state below 2**31, but for the lower half
    ]:
        damaged = with_word(code, place, word)
        if good == 0 and word == 0:
            damaged = with_word(damaged, plan.low_words, 2**31 - 1)
        with pytest.raises(ef.PayloadError, match=f"holds {good} good indices, expected 180"):
            index_code.decode_indices(damaged, 180, 20_000)
    for size in (0, code.size - 1, code.size - 4):
        with pytest.raises(ef.PayloadError, match=f"has {size} bytes, expected {code.size}"):
            index_code.decode_indices(code[:size], 180, 20_000)


def test_elias_fano_codes_that_cannot_be_are_refused():
    code = index_code.encode_indices(np.array([2, 3, 5, 7, 11, 13]), 16)
    more, fewer, beyond, spare = code.copy(), code.copy(), code.copy(), code.copy()
    more[2] |= 0b100000
    fewer[2] = 0b10
    beyond[1:] = 0b11111111, 0  # 0, 1 and then 1: does not ascend
    spare[0] |= 0b1000000
    for damaged, good in ((more, 7), (fewer, 5), (beyond, 2), (spare, 7)):
        with pytest.raises(ef.PayloadError, match=f"holds {good} good indices, expected 6"):
            index_code.decode_indices(damaged, 6, 16)


def test_the_same_code_for_another_bound_is_refused():
    """A set whose last index is out of bounds, in a code that is good but for that."""
    indices = np.arange(0, 20_000, 2)
    code = index_code.encode_indices(indices, 20_000)
    with mock.patch.object(index_code, "indices_nbytes", return_value=code.size):
        plan = index_code._gap_plan(10_000, 20_000)
        with (
            mock.patch.object(index_code, "_gap_plan", return_value=plan),
            pytest.raises(ef.PayloadError, match="holds 9999 good indices, expected 10000"),
        ):
            index_code.decode_indices(code, 10_000, 19_998)


def test_indices_that_do_not_ascend_are_refused():
    with pytest.raises(ValueError, match="do not ascend below 20000"):
        index_code.encode_indices(TRIANGULAR[::-1].copy(), 20_000)


def test_nothing_is_written_outside_and_nothing_is_lost_where_room_is_short():
    plan, fitting = index_code._gap_plan(180, 20_000), []
    symbols, table = index_code._symbols(plan.ratio), index_code._table(plan.ratio)
    for room in range(2, plan.high_words + 1):
        memory = np.full(8 + room + 8, 7, np.uint32)
        low, high = np.zeros(plan.low_words, np.uint32), memory[8:-8]
        high[:] = 0
        fits = kernels_indices.encode_gaps(TRIANGULAR, plan.low_bits, 4, symbols, low, high)
        assert memory[:8].tolist() == memory[-8:].tolist() == [7] * 8
        out = np.empty(180, np.int64)
        good = kernels_indices.decode_gaps(low, high, plan.low_bits, table, 16, 20_000, out)
        assert (good == 180) == fits
        fitting.append(fits)
    assert 3 <= sum(fitting) < len(fitting)  # this set leaves words of its room free
