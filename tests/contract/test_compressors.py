"""Every registered compressor keeps the contract: examples, arbitrary vectors, damaged bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from ef_horovod.compressors.registry import COMPRESSORS
from ef_horovod.errors import NonFiniteError
from ef_horovod.testing import check_compressor, check_vector

FRAMEWORKS = ("numpy", "torch", "tensorflow")
EXAMPLES = [example for cls in COMPRESSORS.values() for example in cls.examples()]
HALF_RANGE = float(np.finfo(np.float32).max) / 2
entries = st.one_of(
    st.floats(-(2.0**100), 2.0**100, width=32),  # hypothesis likes the ends, zeros and denormals
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, -1e-45, 1e-38, 1e30, -1e30]),  # ties
)
vectors = arrays(np.float32, st.integers(0, 70), elements=entries, fill=entries)
each_example = pytest.mark.parametrize("compressor", EXAMPLES, ids=repr)


def test_registry_lists_all_compressors():
    assert {type(example).__name__ for example in EXAMPLES} >= {
        "Identity",
        "Cast",
        "TopK",
        "RandomK",
        "OneBit",
        "OneBitBlocks",
        "TruncateMantissa",
        "QSGD",
        "TernGrad",
        "Natural",
        "NaturalDithering",
        "RandomBlock",
        "HardThreshold",
        "RandomSparsify",
        "Then",
        "Scaled",
    }
    assert all(cls.examples() for cls in COMPRESSORS.values())


@each_example
def test_example_keeps_the_contract(compressor):
    check_compressor(compressor, frameworks=FRAMEWORKS)


@each_example
@settings(max_examples=100)
@given(x=vectors)
def test_any_vector(compressor, x):
    check_vector(compressor, x, FRAMEWORKS)


@each_example
@settings(max_examples=30)
@given(data=st.data(), shape=array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
def test_any_shape(compressor, data, shape):
    x = data.draw(arrays(np.float32, shape, elements=st.floats(-1, 1, width=32)))
    payload, residual = compressor.compress_with_residual(x.copy())
    decoded = payload.decompress()
    assert decoded.shape == residual.shape == shape
    np.testing.assert_allclose(decoded + residual, x, atol=1e-5)
    assert bytes(payload) == bytes(compressor.compress(np.asfortranarray(x)))


@each_example
@settings(max_examples=30)
@given(x=vectors, data=st.data())
def test_one_bad_entry_anywhere_is_refused(compressor, x, data):
    bad = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    place = data.draw(st.integers(0, len(x)))
    with pytest.raises(NonFiniteError, match="expected finite numbers"):
        compressor.compress(np.insert(x, place, bad))


@each_example
@pytest.mark.parametrize("d", [1, 7, 8, 9, 5000])
def test_contraction_holds_where_the_scale_is_extreme(compressor, d):
    delta = compressor.contraction(d)
    x = np.random.default_rng(d).normal(size=d).astype(np.float32)
    x /= np.abs(x).max()
    for scale in (HALF_RANGE, 1e-30, 1.0):
        if delta is None and scale == HALF_RANGE:
            continue  # d / k times a number of half the range is outside of it
        check_vector(compressor, x * np.float32(scale), FRAMEWORKS)


@each_example
def test_integers_and_lists_are_refused(compressor):
    with pytest.raises(TypeError, match="floating-point"):
        compressor.compress(np.arange(5))
    with pytest.raises(TypeError, match="NumPy array, a torch or a TensorFlow tensor"):
        compressor.compress([1.0, 2.0])


DAMAGE = """
import ef_horovod
from ef_horovod.compressors.registry import COMPRESSORS
from ef_horovod.arrays import kernels
from ef_horovod.testing.damage import check_damage
import numpy
try:
    kernels.take(numpy.ones(3, "f"), numpy.array([1 << 40]), numpy.ones(1, "f"))
except IndexError:
    print("bounds are checked")
for cls in COMPRESSORS.values():
    for example in cls.examples():
        check_damage(example)
        print(example)
"""


def test_damaged_payloads_never_index_out_of_bounds(tmp_path):
    """Kernels index without checks; here they are compiled with them, and raise IndexError."""
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", DAMAGE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines() == ["bounds are checked", *map(repr, EXAMPLES)]
