"""Array functions: top-k against a sort, and every device op of torch against the host kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import ef_horovod as ef
import ef_horovod.arrays.numpy as host
import ef_horovod.arrays.torch as device
from ef_horovod.arrays import namespace, torch_matrices, torch_quantize
from ef_horovod.arrays.grid import Grid
from ef_horovod.arrays.matrices import Matrix

LARGE = 300_000  # beyond the length from which top_k samples


def oracle(x, k):
    """Largest magnitudes first, lower index first among equals; as ascending indices."""
    order = np.lexsort((np.arange(x.size), -np.abs(x.astype(np.float64))))
    return np.sort(order[:k])


def assert_top_k(x, k, top_k=host.top_k):
    x = np.asarray(x, np.float32)
    before = x.copy()
    indices, values = top_k(x, k)
    assert indices.dtype == np.int64
    assert values.dtype == np.float32
    np.testing.assert_array_equal(indices, oracle(x, k))
    assert values.tobytes() == x[indices].tobytes()
    assert x.tobytes() == before.tobytes()


def adversaries():
    """Vectors that mislead a strided sample or crowd one bin of the histogram."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=LARGE)
    spikes = normal * 1e-3
    spikes[:: host._stride(LARGE)] = 100 + np.arange(spikes[:: host._stride(LARGE)].size)
    hidden = np.ones(LARGE)
    hidden[1 :: host._stride(LARGE)] = 50 + np.arange(hidden[1 :: host._stride(LARGE)].size) % 7
    return {
        "normal": normal,
        "heavy tails": normal**7,
        "spikes where the sample looks": spikes,
        "spikes where it does not look": hidden,
        "all equal": np.full(LARGE, -3.0),
        "zeros": np.zeros(LARGE),
        "two values": rng.choice([1.0, -2.0], LARGE),
        "one bin": 1 + rng.random(LARGE) * 2.0**-6,
        "few different from zero": np.where(rng.random(LARGE) < 1e-4, normal, 0.0),
        "denormals": normal * 1e-43,
        "ascending": np.arange(LARGE),
        "descending": np.arange(LARGE)[::-1],
        "whole range": 10.0 ** rng.uniform(-44, 38, LARGE),
        "ties": rng.integers(-9, 10, LARGE),
    }


@pytest.mark.parametrize("kind", adversaries())
@pytest.mark.parametrize("k", [1, 300, 3000, 60_000, LARGE - 1, LARGE])
def test_top_k_of_a_long_vector(kind, k):
    assert_top_k(adversaries()[kind], k)


small = arrays(
    np.float32,
    st.integers(0, 40),
    elements=st.one_of(st.floats(allow_nan=False, width=32), st.sampled_from([1, -1, 0.0, -0.0])),
)


@given(x=small, k=st.integers(0, 50))
def test_top_k_of_any_short_vector(x, k):
    assert_top_k(x, min(k, x.size))
    assert_top_k(x, min(k, x.size), on_cpu_tensor(device.top_k.on_device))
    np.testing.assert_array_equal(host.top_k(x, k)[0], host.top_k(x, min(k, x.size))[0])


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("length", [5, 1000, LARGE])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_top_k_shows_what_is_not_finite(on_device, length, bad):
    top_k = on_cpu_tensor(device.top_k.on_device) if on_device else host.top_k
    x = np.random.default_rng(1).normal(size=length).astype(np.float32)
    for count in (1, 3, length // 2, length):
        x[-count:] = bad
        for k in (1, 2, length // 3):
            indices, values = top_k(x, k)
            assert indices.size == k
            assert not np.isfinite(values).all()


def test_top_k_falls_back_where_the_sample_misleads(monkeypatch):
    called = []
    exact = host._candidates_by_histogram
    monkeypatch.setattr(
        host, "_candidates_by_histogram", lambda *args: called.append(1) or exact(*args)
    )
    assert_top_k(adversaries()["normal"], 3000)
    sparse = np.zeros(LARGE)
    sparse[np.arange(0, LARGE, 100)] = -2.0  # as many as are asked for: the sample's rank is a zero
    assert_top_k(sparse, 3000)
    assert not called
    assert_top_k(adversaries()["spikes where it does not look"], 3000)
    assert called


def arrays_of(result):
    """What a device op returns, with tensors (of indices) as NumPy arrays."""
    if isinstance(result, tuple):
        return tuple(arrays_of(part) for part in result)
    return result.cpu().numpy() if isinstance(result, torch.Tensor) else result


def on_cpu_tensor(function):
    """A device op as a function of NumPy arrays that share memory with its tensors."""

    def run(x, *args, **kwargs):
        args = [torch.from_numpy(a) if is_vector(a) else a for a in args]
        kwargs = {n: torch.from_numpy(a) if is_vector(a) else a for n, a in kwargs.items()}
        return arrays_of(function(torch.from_numpy(x), *args, **kwargs))

    def is_vector(a):
        return isinstance(a, np.ndarray) and function.__name__ in (
            "assign",
            "add",
            "average",
            "average_square",
            "divide_by_root",
            "multiply_by_root",
            "divide",
            "divide_checked",
        )

    return run


rng = np.random.default_rng(2)
BITS = rng.integers(0, 256, 1251).astype(np.uint8)
Y = rng.normal(size=10_001).astype(np.float32)
SQUARES = np.where(rng.random(10_001) < 0.1, np.float32(0), Y * Y)
INDICES = np.sort(rng.choice(10_001, 500, replace=False))
VALUES = Y[:500] * 3
CODE, COUNT = "the code of INDICES", "their number"  # of those that fit
CODES = (Y * 1000).astype(np.float16).view(np.uint16)
SCALES = np.abs(Y[:1001]) + np.float32(0.5)
SCALES[3] = 0.0
STREAM = rng.integers(0, 256, 4 * 10_001).astype(np.uint8)
DIGITS = rng.integers(0, 243, 2001).astype(np.uint8)
SHORT = [
    host.shorten(Y, 9, 0, 5, subtract=False),
    host.shorten(Y * np.float32(1e-20), 16, 87, None, subtract=False),
]
SLICES = [(9000, 9500), (0, 1), (4, 9), (20, 20), (100, 3000)]
MATRICES = [Matrix(0, 1, 1, 1), Matrix(5, 30, 41, 4), Matrix(1300, 70, 100, 3)]
FACTORS = list(rng.normal(size=(2, 500)).astype(np.float32))  # left and right, more than enough
SEED = 0xC5AAFEEC074C4D21
GRIDS = [
    Grid("uniform", 1),
    Grid("uniform", 7),
    Grid("uniform", 32767),
    Grid("powers", 3),
    Grid("powers", 127),
    Grid("ternary", 1),
]
CALLS = {
    "fill": [(2.5,)],
    "assign": [(Y,)],
    "divide": [(3,), (4,)],
    "divide_checked": [(3,), (1,)],
    "add": [(Y,), (Y, -1.0), (Y, 0.5)],
    "average": [(Y, 0.25), (Y, 1.0)],
    "average_square": [(Y, 0.25), (Y, 1.0)],
    "divide_by_root": [(SQUARES, 0.0, 0.0, 1e-8), (SQUARES, 0.5, 2.0, 1e-3)],
    "multiply_by_root": [(SQUARES, 0.0, 0.0, 1e-8), (SQUARES, 0.5, 2.0, 1e-3)],
    "abs_sum": [()],
    "abs_max": [()],
    "squared_norm": [()],
    "top_k": [(1,), (100,), (10_001,)],
    "at_least": [(50.0,), (1e-30,), (1e9,)],
    "encode_indices": [(INDICES,)],
    "decode_indices": [(CODE, COUNT)],
    "take": [(INDICES,)],
    "scatter_add": [(INDICES, VALUES, 1.0), (INDICES, VALUES, -0.5)],
    "scatter_put": [(INDICES, VALUES)],
    "pack_signs": [(0.75, {"subtract": True}), (0.75, {"subtract": False})],
    "add_signs": [(BITS, 0.75)],
    "narrow": [
        (kind, shift, {"subtract": subtract})
        for kind in ("float16", "bfloat16")
        for shift in (-100, 0, 7)
        for subtract in (True, False)
    ],
    "add_widened": [
        (CODES, kind, shift, weight)
        for kind in ("float16", "bfloat16")
        for shift in (-3, 0, 20)
        for weight in (1.0, -0.5)
    ],
    "block_max": [(7,), (100,), (20_000,)],
    "block_squares": [(7,), (100,), (20_000,)],
    "block_halves": [(7,), (100,), (20_000,)],
    "quantize": [
        (SCALES, block, grid, SEED, {"subtract": subtract})
        for block, grid, subtract in (
            *((100, grid, True) for grid in GRIDS),
            (33, GRIDS[1], False),
            (20_000, GRIDS[3], True),
            (11, GRIDS[5], True),
        )
    ],
    "add_quantized": [
        (DIGITS if grid.kind == "ternary" else STREAM, SCALES, block, grid, weight)
        for grid in GRIDS[:4] + GRIDS[5:]
        for block, weight in ((100, 1.0), (33, -0.5))
    ],
    "shorten": [
        (width, shift, seed, {"subtract": subtract})
        for width, shift, seed, subtract in (
            (9, 0, SEED, True),
            (9, 87, 5, False),
            (12, 0, None, True),
            (16, 0, None, False),
            (31, 87, None, True),
        )
    ],
    "add_shortened": [(SHORT[0], 9, 0, 1.0), (SHORT[1], 16, 87, -0.5)],
    "add_sides": [(BITS, SCALES, -2 * SCALES, block, w) for block in (33, 20_000) for w in (1, -1)],
    "take_slices": [(SLICES,)],
    "put_slices": [(SLICES, VALUES.repeat(10))],
    "factors": [(MATRICES, FACTORS[1], {"left": True}), (MATRICES, FACTORS[0], {"left": False})],
    "add_products": [(MATRICES, *FACTORS, 1.0), (MATRICES, *FACTORS, -1.0)],
    "add_slices": [(SLICES, VALUES.repeat(10), 1.0), (SLICES, VALUES.repeat(10), -0.5)],
}
IN_ANOTHER_ORDER = {  # sums: equal up to rounding, of so much where terms cancel
    "abs_sum": 0,
    "squared_norm": 0,
    "block_squares": 0,
    "block_halves": 0,
    "factors": 1e-3,
}
WITH_OUT = (
    *("divide", "divide_checked", "average"),
    *("average_square", "divide_by_root", "multiply_by_root"),
)
DEVICE_OPS = {name for name in vars(device) if hasattr(getattr(device, name), "on_device")}


def test_every_device_op_is_tested():
    assert set(CALLS) == DEVICE_OPS


@pytest.mark.parametrize(
    ("name", "call"), [(name, call) for name, calls in CALLS.items() for call in calls]
)
@pytest.mark.parametrize("length", [10_001, 1, 0])
@pytest.mark.parametrize("work", [1 << 22, 1 << 10], ids=["whole", "chunks"])
def test_device_op_equals_host_kernel(name, call, length, work, monkeypatch):
    """On CPU tensors, a device op returns and writes the same bits as the host kernel."""
    for module in (device, torch_quantize, torch_matrices):
        monkeypatch.setattr(module, "_WORK", work)
    x = (np.random.default_rng(3).normal(size=length) * 100).astype(np.float32)
    x[::5] = 0.0
    x[1::50] *= 1e-40
    *args, options = call if call and isinstance(call[-1], dict) else (*call, {})
    args = [fit(a, length) for a in args]
    xs = [x.copy(), x.copy()]
    results = []
    for own, function in zip(
        xs, (getattr(host, name), on_cpu_tensor(getattr(device, name).on_device)), strict=True
    ):
        out = {"out": own} if name in WITH_OUT else {}
        results.append(function(own, *args, **options, **out))
    assert xs[0].tobytes() == xs[1].tobytes()
    if name in IN_ANOTHER_ORDER:
        assert results[0] == pytest.approx(results[1], rel=1e-6, abs=IN_ANOTHER_ORDER[name])
        return
    for a, b in zip(*[r if isinstance(r, tuple) else (r,) for r in results], strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def fit(argument, length):
    """Arrays cut to what belongs to x of another length."""
    if argument is MATRICES:
        return [matrix for matrix in argument if matrix.stop <= length]
    if isinstance(argument, list):
        return [(min(start, length), min(stop, length)) for start, stop in argument]
    if (
        any(argument is whole for whole in (STREAM, DIGITS, SCALES, *SHORT))
        or np.size(argument) > 10_001
        or any(argument is side for side in FACTORS)
    ):
        return argument  # longer than needed
    if argument is INDICES or argument is VALUES:
        fitting = length and np.searchsorted(INDICES, length)
        return argument[:fitting]
    if argument is CODE:
        return host.encode_indices(np.empty(length, np.float32), fit(INDICES, length))
    if argument is COUNT:
        return len(fit(INDICES, length))
    if argument is BITS:
        return argument[: (length + 7) // 8]
    return argument[:length] if isinstance(argument, np.ndarray) else argument


def test_torch_functions_on_cpu_run_the_host_kernels_in_place():
    x = torch.arange(6, dtype=torch.float32)
    device.add(x, torch.ones(6), 2.0)
    device.divide(x, 2.0, out=x)
    assert x.tolist() == [1, 1.5, 2, 2.5, 3, 3.5]
    assert device.address(x) == device.address(x.view(2, 3)) != device.address(x.clone())
    assert device.top_k(x, 2)[0].tolist() == [4, 5]


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 5000, 9999])
def test_a_division_says_whether_all_is_finite(bad, place):
    x = np.full(10_000, 3.4e38, np.float32)  # whose sum is not
    for divide in (host.divide_checked, on_cpu_tensor(device.divide_checked.on_device)):
        own = x.copy()
        assert divide(own, 2, out=own)
        assert own.tobytes() == (x / np.float32(2)).tobytes()
        own[place] = bad
        assert not divide(own, 2, out=own)
        assert not np.isfinite(own[place])


@pytest.mark.parametrize("value", [3.4e38, -3.4e38, 1e-45])
def test_abs_sum_of_extremes(value):
    x = np.full(5000, value, np.float32)
    assert host.abs_sum(x) == pytest.approx(5000 * abs(float(x[0])), rel=1e-6)
    x[77] = np.nan
    assert not np.isfinite(host.abs_sum(x))
    x[77] = np.inf
    assert not np.isfinite(host.abs_sum(x))


@pytest.mark.parametrize("length", [0, 31, 4095, 4096, 4097, 12_345])
def test_abs_sum_has_one_order(length):
    """32 float32 sums side by side, which go to float64 every 4096 entries."""
    x = (np.random.default_rng(5).normal(size=length) ** 5).astype(np.float32)
    whole, total = length - length % 32, 0.0
    for start in range(0, whole, 4096):
        rows = np.abs(x[start : min(start + 4096, whole)]).reshape(-1, 32)
        for lane in np.add.accumulate(rows)[-1]:
            total += float(lane)
    for number in np.abs(x[whole:]):
        total += float(number)
    assert host.abs_sum(x) == total


@pytest.mark.parametrize("length", [0, 1, 63, 64, 200, 5000])
def test_a_squared_norm_is_the_squares_of_one_block(length):
    x = np.random.default_rng(length).normal(size=length).astype(np.float32)
    assert host.squared_norm(x) == host.block_squares(x, max(length, 1)).sum(), "to the last bit"
    assert host.squared_norm(x) == pytest.approx(np.sum(x.astype(np.float64) ** 2))


@pytest.mark.parametrize("length", [1, 63, 4096, 4097, 8200])
def test_packed_and_collected_entries_are_those_of_numpy(length):
    x = np.random.default_rng(6).normal(size=length).astype(np.float32)
    x[::9], x[1::9] = 0.0, -0.0
    expected = np.packbits(x >= 0, bitorder="little")
    np.testing.assert_array_equal(host.pack_signs(x, 0.5, subtract=False), expected)
    x[::11] = np.nan
    for threshold in (0.0, 1.0, 2.5, 100.0):
        indices, values = host.at_least(x, threshold)
        np.testing.assert_array_equal(indices, np.flatnonzero(~(np.abs(x) < threshold)))
        assert values.tobytes() == x[indices].tobytes()
    left = np.where(np.isnan(x), np.float32(0), x)
    signs = np.where(left >= 0, np.float32(0.5), np.float32(-0.5))
    rest = left - signs
    np.testing.assert_array_equal(
        host.pack_signs(left, 0.5, subtract=True), np.packbits(signs > 0, bitorder="little")
    )
    assert left.tobytes() == rest.tobytes()


def test_received_bytes_are_not_shared_with_tensors():
    received = np.frombuffer(np.ones(3, np.float32).tobytes(), np.float32)
    tensor = device.from_host(received)
    tensor += 1
    assert received.tolist() == [1, 1, 1]
    own = np.ones(3, np.float32)
    assert device.address(device.from_host(own)) == host.address(own)


@pytest.mark.parametrize("d", [0, 1, 2, 3, 10, 1000])
def test_random_indices_are_a_sample_without_replacement(d):
    from ef_horovod.arrays import kernels

    seen = np.zeros(d)
    for seed in range(200):
        out = np.empty(-(-d // 3), np.int64)
        kernels.random_indices(np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64), d, out)
        assert len(set(out.tolist())) == out.size
        seen[out] += 1
    if d >= 10:  # each index is in a third of the samples
        share = -(-d // 3) / d
        assert np.abs(seen / 200 - share).max() < 6 * np.sqrt(share * (1 - share) / 200)


def test_namespace_of_subclasses_and_others():
    class Tagged(np.ndarray):
        pass

    assert namespace(np.zeros(1).view(Tagged)) is host
    assert namespace(torch.nn.Parameter(torch.zeros(1))) is device
    for other in ([1.0], 1.0, np.float32(1)):
        with pytest.raises(
            TypeError, match="expected a NumPy array, a torch or a TensorFlow tensor"
        ):
            namespace(other)


def test_squeeze_copies_what_is_read_only() -> None:
    x = np.array([1.0, -5.0, 2.0], np.float32)
    x.flags.writeable = False
    _, residual = ef.TopK(k=1).compress_with_residual(x)
    np.testing.assert_array_equal(x, [1.0, -5.0, 2.0])
    np.testing.assert_array_equal(residual, [1.0, 0.0, 2.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squeeze_leaves_the_autograd_graph(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, -5.0, 2.0], dtype=dtype, requires_grad=True)
    _, residual = ef.TopK(k=1).compress_with_residual(x)
    assert not residual.requires_grad
