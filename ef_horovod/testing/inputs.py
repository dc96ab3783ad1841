"""Checks of a compressor's inputs and outputs: bytes, residuals, frameworks, shapes, dtypes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence

import numpy as np

from ef_horovod.arrays import Array
from ef_horovod.compressors.base import Compressor, Payload, mean_at_once
from ef_horovod.compressors.sparse import Sparsifier
from ef_horovod.errors import NonFiniteError
from ef_horovod.testing.tools import (
    KEY,
    LARGEST,
    LENGTHS,
    ROUNDING,
    SMALLEST,
    array_of,
    bits,
    cast,
    host,
    is_deterministic,
    norm,
    require,
)


def check_vector(compressor: Compressor, x: np.ndarray, frameworks: Sequence[str]) -> None:
    """All that must hold for a single float32[d] x, and equal bytes from all frameworks."""
    payload = compressor.compress(x.copy(), KEY)
    announced = compressor.nbytes(x.size)
    exact = payload.nbytes == len(bytes(payload)) and (
        payload.nbytes == announced if compressor.fixed_size else payload.nbytes >= announced
    )
    require(
        exact,
        compressor,
        f"says nbytes({x.size}) = {compressor.nbytes(x.size)} and nbytes={payload.nbytes}, but "
        f"sends {len(bytes(payload))} bytes",
    )
    decoded = Payload.from_bytes(bytes(payload)).decompress()
    require(
        np.all(np.isfinite(decoded)), compressor, f"decodes to numbers that are not finite for {x}"
    )
    for framework in frameworks:
        _check_in(framework, compressor, x, bytes(payload), decoded)
    delta = compressor.contraction(x.size)
    certain = not compressor.unbiased  # unbiased: the bound holds on average, not for rare draws
    if x.size and delta is not None and certain and is_deterministic(compressor, x):
        lost, allowed = norm(x - decoded.astype(float)), math.sqrt(1 - delta) * norm(x)
        allowed += ROUNDING * norm(x) + SMALLEST * math.sqrt(x.size)
        require(
            lost <= allowed,
            compressor,
            f"loses ||x - C(x)|| = {lost:.9g} of ||x|| = {norm(x):.9g}, which contraction"
            f"({x.size}) = {delta:.9g} does not allow: more than {allowed:.9g}",
        )


def _check_in(
    framework: str, compressor: Compressor, x: np.ndarray, sent: bytes, decoded: np.ndarray
) -> None:
    """Compare one framework's compressed bytes and decompressed numbers with the expected ones."""
    own = array_of(framework, x)
    payload = compressor.compress(own, KEY)
    same = bits(own) == bits(x)
    require(same, compressor, f"compress changed its input, a {framework} array of {x.size}")
    same = bytes(payload) == bytes(compressor.compress(own, KEY))
    require(same, compressor, "compress gives other bytes for the same x and key")
    require(bytes(payload) == sent, compressor, f"gives other bytes for {framework} than for numpy")
    back = payload.decompress()
    require(
        type(back) is type(own) and back.dtype == own.dtype and back.shape == own.shape,
        compressor,
        f"decompresses to {type(back).__name__} {back.dtype} {tuple(back.shape)}, expected "
        f"{type(own).__name__} {own.dtype} {tuple(own.shape)}",
    )
    same = np.array_equal(host(back), decoded)
    require(same, compressor, f"decompresses to other numbers in {framework} than from its bytes")
    squeezed, residual = compressor.compress_with_residual(own, KEY)
    require(
        bytes(squeezed) == sent,
        compressor,
        "compress_with_residual and compress give different bytes",
    )
    wide, kept = x.astype(float), decoded.astype(float)
    off = np.abs(wide - kept - host(residual).astype(float))
    close = off <= ROUNDING * (np.abs(wide) + np.abs(kept)) + SMALLEST
    require(
        close.all(),
        compressor,
        f"compress_with_residual in {framework} breaks x = C(x) + residual at "
        f"{np.flatnonzero(~close)[:5]} of {x}",
    )


def check_zero(compressor: Compressor) -> None:
    """C(0) = 0 and nothing is lost."""
    for d in LENGTHS:
        payload, residual = compressor.compress_with_residual(np.zeros(d, np.float32), KEY)
        zero = not np.any(payload.decompress()) and not np.any(residual)
        require(zero, compressor, f"turns {d} zeros into something else")


def check_skip(compressor: Compressor) -> None:
    """A payload that asks to drop the step is as large as any other; it is never decoded."""
    for d in LENGTHS:
        payload = compressor.skip(np.zeros(d, np.float32))
        least = compressor.nbytes(d)
        fits = payload.nbytes == least if compressor.fixed_size else payload.nbytes >= least
        good = payload.is_skip and fits
        require(good, compressor, f"skip for {d} elements has no flag or another size")


def check_largest_numbers(compressor: Compressor) -> None:
    """The largest float32 entries are compressed, or refused if C(x) can be larger than x."""
    x = np.where(np.arange(1000) % 2, np.float32(LARGEST), np.float32(-LARGEST))
    try:
        decoded = compressor.compress(x, KEY).decompress()
    except NonFiniteError:
        require(
            compressor.contraction(x.size) is None,
            compressor,
            f"refuses finite entries of {LARGEST:g} though it is a contraction",
        )
    else:
        require(np.all(np.isfinite(decoded)), compressor, f"overflows for entries of {LARGEST:g}")


def check_finite(compressor: Compressor, framework: str) -> None:
    """A NaN or an infinity anywhere is refused, by compress and by compress_with_residual."""
    for d in (1, 9, 4099):
        for bad in (np.nan, np.inf, -np.inf):
            for places in (slice(0, 1), slice(d // 2, d // 2 + 1), slice(d - 1, d), slice(0, d)):
                x = np.random.default_rng(d).normal(size=d).astype(np.float32)
                x[places] = bad
                for way in (compressor.compress, compressor.compress_with_residual):
                    try:
                        way(array_of(framework, x), KEY)
                    except NonFiniteError:
                        continue
                    message = f"{way.__name__} lets {bad} through ({framework}, {d} elements)"
                    require(False, compressor, message)


def check_shapes(compressor: Compressor, framework: str) -> None:
    """Arrays of any shape and layout give the bytes of their flat copy and keep their shape."""
    base = array_of(framework, np.random.default_rng(3).normal(size=(6, 10)).astype(np.float32))
    for x in _layouts(base, framework):
        flat = np.ascontiguousarray(host(x)).reshape(-1)
        expected = compressor.compress(flat, KEY)
        payload = compressor.compress(x, KEY)
        what = f"a {framework} array of shape {tuple(x.shape)}"
        same = bytes(payload) == bytes(expected)
        require(same, compressor, f"compresses {what} to other bytes than its flat copy")
        back = payload.decompress()
        same = back.shape == x.shape and bits(back) == bits(expected.decompress())
        require(same, compressor, f"decompresses {what} to another shape or other numbers")
        squeezed, residual = compressor.compress_with_residual(array_of(framework, host(x)), KEY)
        same = residual.shape == x.shape and bytes(squeezed) == bytes(expected)
        require(same, compressor, f"squeezes {what} to another shape or other bytes")


def _layouts(base: Array, framework: str) -> list[Array]:
    """Views of a matrix: whole, transposed, strided, 0-d, empty."""
    if framework == "tensorflow":  # its tensors are always contiguous
        return [array_of(framework, x) for x in _layouts(host(base), "numpy")]
    return [base, base.T, base[::2, 1::3], base[0, 0:1].reshape(()), base[:0]]


def check_dtypes(compressor: Compressor, framework: str) -> None:
    """16-bit and 64-bit floats are compressed as float32 and decompressed to their dtype."""
    x = np.random.default_rng(4).integers(-100, 100, size=50).astype(np.float32)  # exact in all
    for dtype in ("float16", "bfloat16", "float64"):
        if framework == "numpy" and dtype == "bfloat16":
            continue  # not in NumPy
        own = cast(array_of(framework, x), dtype)
        payload = compressor.compress(own, KEY)
        same = bytes(payload) == bytes(compressor.compress(x, KEY))
        require(same, compressor, f"compresses {framework} {dtype} to other bytes than float32")
        back = payload.decompress()
        require(back.dtype == own.dtype, compressor, f"decompresses {dtype} to {back.dtype}")
        residual = compressor.compress_with_residual(own, KEY)[1]
        wide = "float64" if dtype == "float64" else "float32"
        same = wide in str(residual.dtype) and residual.shape == own.shape
        require(same, compressor, f"residual of {dtype} is {residual.dtype}, expected {wide}")
        off = np.abs(x - host(cast(back, "float64")) - host(residual).astype(float)).max()
        limit = 2.0**-8 * float(np.abs(host(cast(back, "float64"))).max())  # bfloat16's rounding
        require(off <= limit, compressor, f"breaks x = C(x) + residual for {dtype} by {off:g}")


def check_generator_untouched(compressor: Compressor, framework: str) -> None:
    """Random compressors draw from their key, not from the framework's generator."""
    state = {
        "numpy": lambda: repr(np.random.get_state(legacy=False)),
        "torch": lambda: importlib.import_module("torch").get_rng_state().tolist(),
        "torch:cuda": lambda: importlib.import_module("torch").cuda.get_rng_state().tolist(),
        "tensorflow": _tensorflow_generator_state,
    }[framework]
    before = state()
    compressor.compress(array_of(framework, np.ones(1000, np.float32)), KEY).decompress()
    require(state() == before, compressor, f"draws from {framework}'s global random generator")


def _tensorflow_generator_state() -> list[int]:
    tf = importlib.import_module("tensorflow")
    return tf.random.get_global_generator().state.numpy().tolist()


def check_mean(compressor: Compressor) -> None:
    """`mean` bitwise equals decoding one payload after the other."""
    for d in (1, 9, 4099):
        rng = np.random.default_rng(d)
        rows = rng.normal(size=(3, d)).astype(np.float32)
        messages = [compressor.compress(row, KEY) for row in rows]
        total = np.zeros(d, np.float32)
        for message in messages:
            message.add_to(total)
        expected = total / np.float32(3)
        for plus in (None, rng.normal(size=d).astype(np.float32)):
            found = np.full(d, 7, np.float32)
            if not mean_at_once(messages, 3, found, plus):
                continue  # not supported, or the payloads are longer than the vector
            same = found.tobytes() == (expected if plus is None else expected + plus).tobytes()
            require(same, compressor, "has a mean of other numbers than add_to makes")


def check_add_to(compressor: Compressor) -> None:
    """add_to(dense, weight) adds weight * C(x), and refuses arrays of another length."""
    for d in (1, 9, 4099):
        rng = np.random.default_rng(d)
        payload = compressor.compress(rng.normal(size=d).astype(np.float32), KEY)
        decoded, start = payload.decompress(), rng.normal(size=d).astype(np.float32)
        for weight in (1.0, -0.5, 0.0, 3.0):
            dense = start.copy()
            payload.add_to(dense, weight)
            expected = start.astype(float) + weight * decoded.astype(float)
            limit = ROUNDING * (np.abs(start) + abs(weight) * np.abs(decoded))
            good = np.all(np.abs(dense - expected) <= limit)
            require(good, compressor, f"add_to(dense, {weight}) does not add {weight} * C(x)")


def check_clear(compressor: Compressor) -> None:
    """clear(x) puts zeros where a payload has an entry, and nowhere else."""
    if not compressor.sends_entries:
        return
    for d in (1, 9, 4099):
        x, kept = np.random.default_rng(d).normal(size=d).astype(np.float32), np.ones(d, np.float32)
        payload = compressor.compress(x, KEY)
        payload.clear(kept)
        unsent = (payload.decompress() == 0).astype(np.float32)
        # `Then` may send an entry as zero.
        good = np.array_equal(kept, unsent if isinstance(compressor, Sparsifier) else kept * unsent)
        require(good, compressor, f"has a clear that misses the entries sent of {d} elements")
