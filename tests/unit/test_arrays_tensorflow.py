"""Array functions of TensorFlow: variables are changed in place, to the bits of NumPy."""

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
from test_arrays import CALLS, WITH_OUT, adversaries, assert_top_k, fit, small

import ef_horovod as ef
import ef_horovod.arrays.numpy as host
import ef_horovod.arrays.tensorflow as device
from ef_horovod import compressors, methods
from ef_horovod.arrays import namespace
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
STAGED = {name for name, value in vars(device).items() if hasattr(value, "__wrapped__")}
WITH_VECTORS = {
    "assign",
    "add",
    "average",
    "average_square",
}  # the kinds of arrays that they are tried with:
KINDS = {"numpy": np.array, "tensor": tf.constant, "variable": tf.Variable}
CASES = [
    (name, call, kind)
    for name, calls in CALLS.items()
    for call in calls
    for kind in (KINDS if name in WITH_VECTORS else ["numpy"])
]


def variable(x):
    """A variable with a copy of x."""
    return tf.Variable(np.array(x, np.float32))


def top_k_of_variable(x, k):
    own = variable(x)
    result = device.top_k(own, k)
    assert own.numpy().tobytes() == x.tobytes()
    return result


def test_every_function_is_tested():
    assert set(CALLS) == STAGED - {"write"} | {"assign"}


@pytest.mark.covering(factors=lambda name, call, kind, length: (name, call, kind, length))
@pytest.mark.parametrize(("name", "call", "kind"), CASES)
@pytest.mark.parametrize("length", [10_001, 9, 1, 0])
def test_a_variable_gets_the_bits_of_numpy(name, call, kind, length):
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
    for a, b in zip(*[r if isinstance(r, tuple) else (r,) for r in (found, expected)], strict=True):
        assert type(a) is type(b)
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_parts_of_a_variable_are_written_and_read():
    own = variable(np.zeros(6))
    device.write(own, 2, np.float32([[1, 2], [3, 4]]))
    assert own.numpy().tolist() == [0, 0, 1, 2, 3, 4]
    part = device.read(own, 1, 4)
    part[:] = 9
    assert own.numpy().tolist() == [0, 0, 1, 2, 3, 4]
    assert device.read(own, 1, 4).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", sorted(WITH_OUT))
def test_out_may_be_another_variable(name):
    x, y, out = variable(np.float32([1, 2])), variable(np.float32([4, 16])), variable([0, 0])
    arguments, expected = {
        "average": ((y, 0.5), [2.5, 9]),
        "average_square": ((y, 0.5), [8.5, 129]),
        "divide_by_root": ((y, 3.0, 9.0, 1.0), [0.25, 0.4]),
        "multiply_by_root": ((y, 3.0, 9.0, 1.0), [4, 10]),
    }.get(name, ((4.0,), [0.25, 0.5]))
    getattr(device, name)(x, *arguments, out=out)
    assert x.numpy().tolist() == [1, 2]
    assert out.numpy() == pytest.approx(expected)


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


def test_new_vectors_are_numpy_s():
    for made in (device.zeros(3), device.zeros(3, CPU)):
        assert isinstance(made, np.ndarray)
        assert made.dtype == np.float32
    with pytest.raises(ValueError, match="is a tensor of TensorFlow, not a variable"):
        ef.TopK(k=1).compress(np.ones(3, "f")).add_to(tf.zeros(3))


def test_flat_float32_of_variables():
    flat = variable([1.0, 2.0])
    assert device.flat_float32(flat, writable=True) is flat
    for other in (
        flat,
        tf.Variable([[1.5, 2.0], [3.0, 4.0]]),
        tf.Variable([1.5, 2, 3, 4], dtype="half"),
    ):
        own = device.flat_float32(other)
        assert isinstance(own, np.ndarray)
        assert own.dtype == np.float32
        assert own.tolist() == other.numpy().reshape(-1).tolist()
        if other is not flat:
            device.flat_float32(other, writable=True)[:] = 0.0
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
import numpy as np
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
import ef_horovod as ef
import ef_horovod.arrays.tensorflow as device

with tf.device("/CPU:1"):
    x = tf.Variable([[1.0, -5.0, 2.0]])
    flat = tf.Variable(tf.zeros(3))
payload = ef.TopK(k=1).compress(x)
payload.add_to(flat)
assert flat.numpy().tolist() == [0, -5, 0]
assert payload.decompress().numpy().tolist() == [[0, -5, 0]]
assert payload.decompress().device == device.from_host(np.ones(3), x.device).device == x.device
assert "CPU:1" in x.device
"""


def test_results_are_on_the_device_of_the_variable():
    """With two devices: what is not placed goes to the first one."""
    root = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", PLACEMENT],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]


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


@pytest.mark.covering(factors=lambda method: (type(method), type(method.compressor)))
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_methods_on_variables_are_those_on_numpy(method):
    """Gradients in variables, which a method may change in place or keep; to the last bit."""
    rng, d = np.random.default_rng(4), 301
    ranks, kinds = range(2), (variable, np.array)
    workers = [[method.init(kind(np.zeros(d, "f")), 2)[0] for _ in ranks] for kind in kinds]
    servers = [method.init(kind(np.zeros(d, "f")), 2)[1] for kind in kinds]
    for t in range(5):
        gradients = rng.normal(size=(2, d)).astype(np.float32)
        keys = [ef.Key(step=t, rank=rank, workers=2) for rank in ranks]
        ways = []
        for way, kind in enumerate(kinds):
            pushed = [
                method.push(worker, kind(g), key)
                for worker, g, key in zip(workers[way], gradients, keys, strict=True)
            ]
            messages = [message for message, _ in pushed]
            aggregate, servers[way] = method.reduce(servers[way], messages, keys[0].of_server())
            pulled = [method.pull(state, aggregate) for _, state in pushed]
            workers[way] = [state for _, state in pulled]
            directions = [namespace(x).to_host(x).tobytes() for x, _ in pulled]
            ways.append(([bytes(message) for message in messages], directions))
        assert ways[0] == ways[1]


def test_a_channel_of_variables_has_numpy_arrays():
    ranks = channels(ef.ErrorFeedback(ef.TopK(k=3)), variable(np.zeros(40)))
    assert step(ranks, np.ones((3, 40), np.float32), 0)[1][0].sum() == 3
    assert all(isinstance(x, np.ndarray) for rank in ranks for x in (rank.gradient, *rank.worker))


@pytest.mark.covering
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
