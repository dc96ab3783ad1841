"""Every device op of torch, on a GPU, against the host kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_arrays import (
    CALLS,
    IN_ANOTHER_ORDER,
    LARGE,
    WITH_OUT,
    adversaries,
    arrays_of,
    assert_top_k,
    fit,
)

import ef_horovod as ef
import ef_horovod.arrays.numpy as host
import ef_horovod.arrays.torch as device
from ef_horovod.arrays import torch_matrices, torch_quantize
from ef_horovod.errors import NonFiniteError, PayloadError

VECTORS = ("assign", "add", "average")  # take tensors beside x


def on_gpu(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.copy()).cuda()


def top_k_on_gpu(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    return arrays_of(device.top_k(on_gpu(x), k))


@pytest.mark.parametrize(
    ("name", "call"), [(name, call) for name, calls in CALLS.items() for call in calls]
)
@pytest.mark.parametrize("length", [LARGE, 10_001, 1, 0])
@pytest.mark.parametrize("work", [1 << 22, 1 << 10], ids=["whole", "chunks"])
def test_an_op_equals_the_host_kernel(name, call, length, work, monkeypatch) -> None:
    for module in (device, torch_quantize, torch_matrices):
        monkeypatch.setattr(module, "_WORK", work)
    if length == LARGE and name not in ("top_k", "abs_sum", "squared_norm", "pack_signs", "narrow"):
        length = 10_000  # the arguments of the others are no longer
    x = (np.random.default_rng(3).normal(size=length) * 100).astype(np.float32)
    x[::5] = 0.0
    x[1::50] *= 1e-40
    own = on_gpu(x)
    *args, options = call if call and isinstance(call[-1], dict) else (*call, {})
    args = [fit(a, length) for a in args]
    tensors = [on_gpu(a) if name in VECTORS and isinstance(a, np.ndarray) else a for a in args]
    outs = [{"out": x}, {"out": own}] if name in WITH_OUT else [{}, {}]
    expected = getattr(host, name)(x, *args, **options, **outs[0])
    found = getattr(device, name)(own, *tensors, **options, **outs[1])
    assert own.cpu().numpy().tobytes() == x.tobytes()
    if name in IN_ANOTHER_ORDER:
        assert found == pytest.approx(expected, rel=1e-5, abs=IN_ANOTHER_ORDER[name])
        return
    results = arrays_of(found), expected
    for a, b in zip(*[r if isinstance(r, tuple) else (r,) for r in results], strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("kind", adversaries())
@pytest.mark.parametrize("k", [1, 3000, LARGE])
def test_top_k_of_a_long_vector(kind, k) -> None:
    assert_top_k(adversaries()[kind], k, top_k_on_gpu)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(bad) -> None:
    x = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    for place in (0, 500, 999):
        damaged = x.copy()
        damaged[place] = bad
        own = on_gpu(damaged)
        assert device.top_k(own, 1)[0].tolist() == [place]
        for sized in (device.abs_max, device.abs_sum, device.squared_norm):
            assert not np.isfinite(sized(own))


def test_a_vector_that_is_not_finite_is_refused() -> None:
    x = torch.ones(10_000, device="cuda")
    x[777] = float("nan")
    with pytest.raises(NonFiniteError):
        ef.TopK(ratio=0.01).compress(x)


def test_a_damaged_index_code_is_refused_before_anything_is_written() -> None:
    sent = ef.TopK(k=100).compress(on_gpu(np.arange(10_000, dtype=np.float32)))
    damaged = bytearray(bytes(sent))
    damaged[len(damaged) - 400 - 1] ^= 0x80  # one more set bit at the end of the code
    dense = torch.ones(10_000, device="cuda")
    with pytest.raises(PayloadError, match="expected 100 ascending ones below 10000"):
        ef.Payload.from_bytes(damaged).add_to(dense)
    assert bool((dense == 1).all())
