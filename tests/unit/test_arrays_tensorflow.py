"""Array functions of TensorFlow: native ops on variables against the host kernels, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from test_arrays import CALLS, IN_ANOTHER_ORDER, WITH_OUT, adversaries, assert_top_k, fit, small

import ef_horovod as ef
import ef_horovod.arrays.numpy as host
import ef_horovod.arrays.tensorflow as device
from ef_horovod import compressors, methods
from ef_horovod.arrays import namespace, tensorflow_matrices, tensorflow_quantize
from ef_horovod.errors import NonFiniteError
from ef_horovod.exchange.channel import finish_step
from ef_horovod.training.choice import choose
from ef_horovod.transports.local import local_group

CPU = "/job:localhost/replica:0/task:0/device:CPU:0"
COMPRESSORS = [
    example for cls in compressors.registry.COMPRESSORS.values() for example in cls.examples()
]
METHODS = [
    m for cls in methods.registry.METHODS.values() for c in COMPRESSORS for m in cls.examples(c)
]
DEVICE_OPS = {name for name in vars(device) if hasattr(getattr(device, name), "on_device")}
WITH_VECTORS = {"assign", "add", "average"}  # the kinds of arrays that they are tried with:
KINDS = {"numpy": np.array, "tensor": tf.constant, "variable": tf.Variable}
CASES = [
    (name, call, kind)
    for name, calls in CALLS.items()
    for call in calls
    for kind in (KINDS if name in WITH_VECTORS else ["numpy"])
]


def variable(x):
    """A working vector that holds a copy of x."""
    own = device.device_zeros(len(x), CPU)
    own.assign(x)
    return own


def top_k_of_variable(x, k):
    own = variable(x)
    result = device.top_k(own, k)
    assert own.numpy().tobytes() == x.tobytes()
    return result


def test_every_native_op_is_tested():
    assert set(CALLS) == DEVICE_OPS


@pytest.mark.parametrize(("name", "call", "kind"), CASES)
@pytest.mark.parametrize("length", [10_001, 9, 1, 0])
@pytest.mark.parametrize("work", [1 << 22, 1 << 10], ids=["whole", "chunks"])
def test_native_op_equals_host_kernel(name, call, kind, length, work, monkeypatch):
    """A native op returns and writes the same bits as the host kernel."""
    for module in (device, tensorflow_quantize, tensorflow_matrices):
        monkeypatch.setattr(module, "_WORK", work)
    x = (np.random.default_rng(3).normal(size=length) * 100).astype(np.float32)
    x[::5] = 0.0
    own = variable(x)
    *args, options = call if call and isinstance(call[-1], dict) else (*call, {})
    args = [fit(a, length) for a in args]
    native = [KINDS[kind](a) if isinstance(a, np.ndarray) else a for a in args]
    outs = [{"out": x}, {"out": own}] if name in WITH_OUT else [{}, {}]
    expected = getattr(host, name)(x, *args, **options, **outs[0])
    found = getattr(device, name)(own, *native, **options, **outs[1])
    assert own.numpy().tobytes() == x.tobytes()
    if name in IN_ANOTHER_ORDER:
        assert found == pytest.approx(expected, rel=1e-6, abs=IN_ANOTHER_ORDER[name])
        return
    for a, b in zip(*[r if isinstance(r, tuple) else (r,) for r in (found, expected)], strict=True):
        assert type(a) is type(b)
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("name", sorted(WITH_OUT))
def test_out_may_be_another_variable(name):
    x, y, out = variable(np.float32([1, 2])), variable(np.float32([5, 4])), variable([0, 0])
    getattr(device, name)(x, *(y, 0.5) if name == "average" else (4.0,), out=out)
    assert x.numpy().tolist() == [1, 2]
    assert out.numpy().tolist() == ([3, 3] if name == "average" else [0.25, 0.5])


@pytest.mark.parametrize("kind", adversaries())
@pytest.mark.parametrize("k", [1, 3000])
def test_top_k_of_a_long_vector(kind, k):
    assert_top_k(adversaries()[kind], k, top_k_of_variable)


@given(x=small, k=st.integers(0, 50))
def test_top_k_of_any_short_vector(x, k):
    assert_top_k(x, min(k, x.size), top_k_of_variable)
    np.testing.assert_array_equal(top_k_of_variable(x, k)[0], host.top_k(x, k)[0])


@pytest.mark.parametrize("length", [5, 1000])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(length, bad):
    x = np.random.default_rng(1).normal(size=length).astype(np.float32)
    for place in (0, length // 2, length - 1):
        damaged = x.copy()
        damaged[place] = bad
        own = variable(damaged)
        assert device.top_k(own, 1)[0].tolist() == [place]
        for sized in (device.abs_max, device.abs_sum, device.squared_norm):
            assert not np.isfinite(sized(own))


def test_nan_ranks_above_infinity_as_on_the_host():
    x = np.float32([1, np.inf, np.nan, -np.inf, -np.nan, 3e38, 0, np.inf])
    for k in range(x.size + 1):
        for found, expected in zip(top_k_of_variable(x, k), host.top_k(x, k), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("value", [3.4e38, -3.4e38, 1e-37])
def test_sums_of_extremes(value):
    own = variable(np.full(5000, value, np.float32))
    assert device.abs_sum(own) == pytest.approx(5000 * abs(value), rel=1e-6)
    assert device.squared_norm(own) == pytest.approx(5000 * value**2, rel=1e-6)


WRITES = {
    "fill": (3.0,),
    "add": (np.ones(9, np.float32),),
    "scatter_add": (np.array([4]), np.float32([7]), 1.0),
    "scatter_put": (np.array([4]), np.float32([7])),
    "add_signs": (np.array([255, 1], np.uint8), 1.0),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("before", [None, "add", "scatter_add"])
def test_what_was_read_or_assigned_before_stays_as_it_was(name, before):
    """TensorFlow lets variables and what was read from them share memory, until one is written."""
    own, copy, later = (variable(np.arange(9, dtype=np.float32)) for _ in range(3))
    if before is not None:
        getattr(device, before)(own, *WRITES[before])
    device.assign(copy, own)
    device.assign(later, own)
    on_host, values = device.to_host(own), own.numpy()
    getattr(device, name)(own, *WRITES[name])
    assert own.numpy().tolist() != values.tolist()
    for untouched in (on_host, copy.numpy(), later.numpy()):
        assert untouched.tolist() == values.tolist()
    changed = own.numpy()
    getattr(device, name)(copy, *WRITES[name])
    assert copy.numpy().tolist() == changed.tolist() == own.numpy().tolist()
    assert later.numpy().tolist() == values.tolist()


def test_zeros_are_a_variable_where_a_device_is_named():
    assert isinstance(device.zeros(3), np.ndarray)
    named = device.zeros(3, CPU)
    assert isinstance(named, tf.Variable)
    assert not named.trainable
    assert named.device == CPU
    assert named.dtype == tf.float32
    again = device.zeros(3, named.device)
    assert again.numpy().tolist() == [0, 0, 0]
    assert device.address(again) == device.address(again) != device.address(named)


def test_zeros_while_a_function_is_traced():
    made = []

    @tf.function
    def step(x):
        if not made:
            made.append(device.zeros(2, CPU))
        return x + made[0]

    assert step(tf.ones(2)).numpy().tolist() == [1, 1]
    device.fill(made[0], 4.0)
    assert step(tf.ones(2)).numpy().tolist() == [5, 5]


def test_flat_float32_of_variables():
    flat = variable([1.0, 2.0])
    assert device.flat_float32(flat) is flat
    assert device.flat_float32(flat, writable=True) is flat
    for other in (tf.Variable([[1.5, 2.0], [3.0, 4.0]]), tf.Variable([1.5, 2, 3, 4], dtype="half")):
        own = device.flat_float32(other)
        assert isinstance(own, tf.Variable)
        assert own.dtype == tf.float32
        assert own.device == other.device
        assert own.numpy().tolist() == [1.5, 2, 3, 4]
        device.fill(own, 0.0)
        assert np.sum(other.numpy()) == 10.5
    assert isinstance(device.flat_float32(tf.ones([2, 2])), np.ndarray)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_restored_variables_are_tensors_like_the_original(dtype):
    original = tf.Variable(tf.ones([2, 3], dtype))
    target = device.like(original)
    assert (target.shape, target.dtype, target.device) == ((2, 3), original.dtype, CPU)
    assert device.is_float(original)
    assert device.is_float64(original) == (dtype == "float64")
    flat = variable(np.arange(6))
    restored = device.restore(flat, target)
    assert isinstance(restored, tf.Tensor)
    assert restored.dtype == original.dtype
    assert restored.numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert device.shaped(flat, target).numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert device.shaped(flat, device.like(flat)) is flat
    device.fill(flat, 9.0)
    assert restored.numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert not device.is_float(tf.Variable([1, 2]))


def test_detached_variables_have_no_gradient():
    x = tf.Variable([1.0, 2.0])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(device.detached(x) * 3.0)
    assert tape.gradient(loss, x) is None


def test_symbolic_reads_are_refused():
    own = variable([1.0])
    with pytest.raises(TypeError, match="symbolic tensor .* of a tf.function, expected an eager"):
        tf.function(lambda: device.to_host(own))()


def test_namespace_of_variables():
    assert namespace(tf.Variable(1.0)) is device
    assert namespace(tf.constant(1.0)) is device
    with pytest.raises(TypeError, match=r"got a keras.*Variable, .* pass variable\.value"):
        namespace(keras.Variable(np.zeros(2)))
    assert namespace(keras.Variable(np.zeros(2)).value) is device


PLACEMENT = """
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
import ef_horovod.arrays.tensorflow as device
from ef_horovod.arrays import tensorflow_matrices, tensorflow_quantize
from test_arrays import CALLS, WITH_OUT, fit

def watch(owner, name):
    def run(*args, **kwargs):
        seen.update(a.device for a in args if isinstance(a, (tf.Tensor, tf.Variable)))
        return original(*args, **kwargs)
    original = getattr(owner, name)
    setattr(owner, name, run)

x = device.zeros(100, "/CPU:1")
one = x.device
for owner in (device, tensorflow_matrices, tensorflow_quantize, tf, type(x)):
    for function in ("to_host", "put", "_put", "reduce_sum", "reduce_max", "assign", "assign_add"):
        if hasattr(owner, function):
            watch(owner, function)
for name, calls in CALLS.items():
    for call in calls:
        *args, options = call if call and isinstance(call[-1], dict) else (*call, {})
        out = {"out": x} if name in WITH_OUT else {}
        seen = set()
        getattr(device, name)(x, *[fit(a, 100) for a in args], **options, **out)
        print(name, *(place == one for place in seen))
with tf.device(one):
    matrix = tf.Variable(device.from_host(fit(call[0], 100), one)[None])
flat, seen = device.flat_float32(matrix), set()
print("flat", flat.device == one, device.restore(flat, device.like(matrix)).device == one)
"""


def test_ops_run_on_the_device_of_the_variable():
    """With two devices: what is not placed runs on the first one."""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    run = subprocess.run(
        [sys.executable, "-c", PLACEMENT],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    reports = [line.split() for line in run.stdout.splitlines()]
    assert {name for name, *_ in reports} == {*DEVICE_OPS, "flat"}
    # What scatters or codes indices makes no tensors; an assigned NumPy array is placed by the
    # variable.
    silent = {"scatter_add", "scatter_put", "assign", "encode_indices", "decode_indices"}
    assert {name for name, *places in reports if not places} <= silent
    assert [report for report in reports if "False" in report] == []


def channels(method, like):
    """One for each of three ranks."""
    return [choose("auto", method).open("c", like, method, endpoint) for endpoint in local_group(3)]


def step(ranks, gradients, t):
    """(bytes that each rank sent, directions as NumPy arrays or None)."""
    for channel, g in zip(ranks, gradients, strict=True):
        namespace(channel.gradient).assign(channel.gradient, g)
        channel.start(t)
    sent = [channel._message and bytes(channel._message) for channel in ranks]
    outcomes = [finish_step([channel]) for channel in ranks]
    return sent, [d and namespace(d[0]).to_host(d[0]).copy() for d in outcomes]


@pytest.mark.parametrize("exchange", ["auto", "server", "double_pass"])
def test_a_simulation_takes_the_steps_of_numpy(exchange):
    method = ef.EF21(ef.TopK(k=3), server_compressor=ef.TopK(k=5))
    start = np.linspace(-1, 1, 40, dtype=np.float32)
    runs = [
        ef.simulate(
            method, lambda i, x, t: x - float(i), x0, workers=3, steps=9, step_size=0.5,
            exchange=exchange,
        )
        for x0 in (start, tf.constant(start))
    ]  # fmt: skip
    assert tf.is_tensor(runs[1].x)
    assert runs[1].x.numpy().tobytes() == runs[0].x.tobytes()


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_methods_on_variables_are_those_on_numpy(method):
    """To the last bit but for sums (OneBit's scale, factors), which have another order here."""
    rng, d = np.random.default_rng(4), 301
    native, numpy = channels(method, variable(np.zeros(d))), channels(method, np.zeros(d, "f"))
    for t in range(6):
        gradients = rng.normal(size=(3, d)).astype(np.float32)
        if t == 3:
            gradients[:, 7] = np.nan  # on all ranks, for not all take part in every method
        sent, directions = step(native, gradients, t)
        expected_sent, expected = step(numpy, gradients, t)
        if t == 3:
            assert directions == expected == [None] * 3
        elif isinstance(method.compressor, ef.OneBit) or isinstance(method, ef.PowerSGD):
            np.testing.assert_allclose(directions, expected, rtol=1e-5, atol=1e-5)
            assert [len(s) for s in sent] == [len(s) for s in expected_sent]
        else:
            assert sent == expected_sent
            assert np.array(directions).tobytes() == np.array(expected).tobytes()
    for a, b in zip(native, numpy, strict=True):
        arrays = [
            x
            for x in (a.gradient, *(a.worker or ()), *(a.server or ()))
            if hasattr(x, "shape") and x.shape[0] == d
        ]
        assert all(isinstance(x, tf.Variable) for x in arrays)
        assert len({device.address(x) for x in arrays}) == len(arrays)
        error = b.stats().relative_error
        assert a.stats().relative_error == pytest.approx(error, rel=1e-4, nan_ok=True)
        assert (a.stats().bytes_out, a.stats().skipped) == (b.stats().bytes_out, 1)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("shape", [(100,), (20, 5), (), (0,)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_variables_are_compressed(compressor, shape, dtype):
    x = np.random.default_rng(5).normal(size=shape).astype(dtype)
    own = tf.Variable(x)
    payload, expected = compressor.compress(own), compressor.compress(x)
    np.testing.assert_allclose(payload.decompress(), expected.decompress(), rtol=1e-6)
    assert own.numpy().tobytes() == x.tobytes()
    assert isinstance(payload.decompress(), tf.Tensor)
    assert payload.decompress().dtype == own.dtype
    assert payload.nbytes == expected.nbytes
    assert expected.nbytes == compressor.nbytes(x.size) or not compressor.fixed_size
    squeezed, residual = compressor.compress_with_residual(own)
    assert bytes(squeezed) == bytes(payload)
    assert (residual is own) == (shape in ((100,), (0,)) and dtype == "float32")
    assert tuple(residual.shape) == shape
    lost = compressor.compress_with_residual(x.copy())[1]
    np.testing.assert_allclose(tf.convert_to_tensor(residual), lost, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_variables_with_a_bad_entry_are_refused(compressor, bad):
    x = np.random.default_rng(6).normal(size=50).astype(np.float32)
    x[30] = bad
    for way in (compressor.compress, compressor.compress_with_residual):
        with pytest.raises(NonFiniteError, match="expected finite numbers"):
            way(tf.Variable(x))
    expected = compressor.skip(np.zeros_like(x)).nbytes
    assert compressor.skip(tf.Variable(x)).nbytes == expected
