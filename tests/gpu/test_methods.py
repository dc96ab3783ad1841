"""Every compressor and every method, with gradients and memories on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ef_horovod as ef
from ef_horovod.testing import check_compressor
from ef_horovod.testing.frameworks import check_frameworks
from ef_horovod.testing.pairs import every_compressor, selection

# The scale of OneBit and the factors of PowerSGD are sums, which a GPU takes in another order.
EXACT = [m for m in selection() if "OneBit" not in repr(m) and not isinstance(m, ef.PowerSGD)]
COMPRESSORS = [compressor for compressor in every_compressor() if compressor != ef.OneBit()]


@pytest.mark.parametrize("method", EXACT, ids=repr)
def test_a_method_sends_the_bytes_of_numpy(method) -> None:
    check_frameworks(method, ("torch:cuda",))


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_a_compressor_keeps_its_promises(compressor) -> None:
    check_compressor(compressor, frameworks=("torch:cuda",))


def test_one_bit_differs_in_the_rounding_of_its_scale_alone() -> None:
    x = np.random.default_rng(0).standard_normal(100_000, np.float32)
    here = ef.OneBit().compress(x).decompress()
    there = ef.OneBit().compress(torch.from_numpy(x).cuda()).decompress()
    np.testing.assert_allclose(there.cpu().numpy(), here, rtol=1e-6)
