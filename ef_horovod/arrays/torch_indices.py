"""The code of index sets, for torch; `arrays/torch.py` re-exports it.

Off the CPU, indices stay on the device, and the bytes are those of the host's code.
"""

from __future__ import annotations

import numpy as np
import torch

from ef_horovod.arrays.grid import bits_nbytes
from ef_horovod.arrays.numpy_indices import __all__ as __all__
from ef_horovod.arrays.numpy_indices import indices_nbytes, low_bits, require_good, require_length
from ef_horovod.arrays.torch_device import (
    beside,
    from_host,
    kernel,
    pack_codes,
    to_host,
    unpack_codes,
)


@kernel
def encode_indices(x: torch.Tensor, indices: np.ndarray | torch.Tensor) -> np.ndarray:
    own, d = beside(x, indices), x.numel()
    k = own.numel()
    if k == 0:
        return np.empty(0, np.uint8)
    bits = low_bits(k, d)
    split = bits_nbytes(k, bits)
    code = torch.empty(indices_nbytes(k, d), dtype=torch.uint8, device=x.device)
    if bits:
        code[:split] = pack_codes(own & ((1 << bits) - 1), bits)
    unary = torch.zeros(8 * (code.numel() - split), dtype=torch.uint8, device=x.device)
    unary[(own >> bits) + torch.arange(k, device=x.device)] = 1
    code[split:] = pack_codes(unary, 1)
    return to_host(code)


@kernel
def decode_indices(x: torch.Tensor, code: np.ndarray, k: int) -> torch.Tensor:
    d = x.numel()
    require_length(code, k, d)
    if k == 0:
        return x[:0].long()
    bits = low_bits(k, d)
    low, high = from_host(code, x.device).tensor_split([bits_nbytes(k, bits)])
    unary = (high.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=x.device)) & 1
    places = torch.nonzero(unary.view(-1)).view(-1)
    found = min(places.numel(), k)
    indices = (places[:found] - torch.arange(found, device=x.device)) << bits
    if bits:
        indices |= unpack_codes(low, bits, k)[:found]
    broken = indices >= d
    broken[1:] |= indices[1:] <= indices[:-1]
    first = torch.nonzero(broken).view(-1)[:1].tolist()
    require_good(first[0] if first else min(places.numel(), k + 1), code, k, d)
    return indices
